"""Pictures and sounds of a request become what llama-server cannot read in two ways: lossless pixels, plain samples."""

from __future__ import annotations

import base64
import io
import secrets
import wave
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..runtime import pictures
from ..runtime.pictures import Budget, PictureError, PictureTooLarge
from .endpoints import Media
from .errors import RequestError

FOLDER_BYTES = 2 << 30  # of all pictures on their way
SOUND_S = 600
SAMPLE_RATES = range(8000, 192_001)


@dataclass(frozen=True)
class Limits:
    body_bytes: int
    pictures: pictures.Limits
    remote_images: bool


def prepare(media: list[tuple[Media, bytes | None]], limits: Limits, folder: Path, made: list[Path], warn: Callable[[str], None]) -> None:
    """Each medium, with the file where it was fetched, is replaced in its request. Pictures go into files of `folder` where llama-server takes a URL: as
    base64 they would be many times as large as what the client sent, and 100 MiB are all that it takes. `made`: these files are added; warn: is told of pictures that may not show what was meant. Raises RequestError."""
    budget = Budget(limits.pictures)
    for n, (medium, fetched) in enumerate(media, 1):
        name = f"picture {n}"
        try:
            data = fetched if fetched is not None else _decoded(medium.text, budget, name)
            budget.check_file(len(data), name)
            if medium.sound:
                medium.put(_base64(_wav(data)))
                continue
            picture = pictures.decode(data, budget, name)
            if picture.warning:
                warn(picture.warning)
            if medium.by_url:
                if _stored(folder) + picture.rgb.nbytes > FOLDER_BYTES:
                    raise RequestError(503, "there are too many large pictures at once")
                made.append(folder / f"{secrets.token_hex(16)}.ppm")
                pictures.write_ppm(made[-1], picture.rgb)
                medium.put(f"file://{made[-1].name}")
            else:
                medium.put(_base64(pictures.to_png(picture.rgb)))
        except PictureError as error:
            raise RequestError(413 if isinstance(error, PictureTooLarge) else 400, str(error)) from None
        except OSError as error:
            raise RequestError(503, f"{name} cannot be stored for llama-server ({error.strerror})") from None


def _stored(folder: Path) -> int:
    """Bytes of all files."""
    total = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # just removed
            total += file.stat().st_size
    return total


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decoded(text: str, budget: Budget, name: str) -> bytes:
    if text[:5].lower() == "data:":
        return pictures.from_data_url(text, budget, name)
    if ":" in text[:16]:
        raise RequestError(400, "a picture must be a data: URL or base64")
    return pictures.from_base64(text, budget, name)


def _wav(data: bytes) -> bytes:
    """Written anew. Compressed sound is refused: a few bytes of it can be hours."""
    try:
        with wave.open(io.BytesIO(data)) as sound:
            rate, channels, width = sound.getframerate(), sound.getnchannels(), sound.getsampwidth()
            samples = sound.readframes(SOUND_S * rate + 1)
    except (wave.Error, EOFError, ValueError, RuntimeError):
        raise RequestError(400, "a sound must be a WAV file (PCM)") from None
    if rate not in SAMPLE_RATES or not 1 <= channels <= 2 or len(samples) > SOUND_S * rate * channels * width:
        raise RequestError(413, f"a sound may have two channels, {SAMPLE_RATES[0]} to {SAMPLE_RATES[-1]} samples a second and {SOUND_S} seconds")
    out = io.BytesIO()
    with wave.open(out, "wb") as sound:
        sound.setparams((channels, width, rate, 0, "NONE", ""))
        sound.writeframes(samples)
    return out.getvalue()
