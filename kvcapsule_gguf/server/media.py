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

from PIL import Image

from ..runtime import pictures
from ..runtime.pictures import Budget, PictureError, PictureTooLarge
from .endpoints import Media
from .errors import RequestError

FOLDER_BYTES = 2 << 30  # of all pictures on their way
SOUND_S = 600
SAMPLE_RATES = range(8000, 192_001)
PICTURE_BYTES = 4 << 20  # of the floats that a projector takes, however small the picture is


@dataclass(frozen=True)
class Limits:
    body_bytes: int
    pictures: pictures.Limits
    remote_images: bool


def prepare(media: list[tuple[Media, bytes | None]], limits: Limits, folder: Path, made: list[Path], warn: Callable[[str], None]) -> int:
    """Each medium, with the file where it was fetched, is replaced in its request. Pictures go into files of `folder` where llama-server takes a URL: as
    base64 they would be many times as large as what the client sent, and 100 MiB are all that it takes. `made`: these files are added; warn: is told of pictures that may not
    show what was meant. Returns about how many bytes the pictures are in llama-server. Raises RequestError."""
    budget = Budget(limits.pictures)
    files = [_file(medium, fetched, budget, f"picture {n}") for n, (medium, fetched) in enumerate(media, 1)]
    if sum(map(_pixels, files)) > limits.pictures.total_pixels:  # before the first one costs time and room
        raise RequestError(413, f"the pictures have more than {limits.pictures.total_pixels / 1e6:g} million pixels together")
    needs = 0
    for n, ((medium, _), data) in enumerate(zip(media, files), 1):
        name = f"picture {n}"
        try:
            if medium.sound:
                medium.put(_base64(_wav(data)))
                continue
            picture = pictures.decode(data, budget, name)
            needs += 4 * picture.width * picture.height + PICTURE_BYTES
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
            raise _refused(error) from None
        except OSError as error:
            raise RequestError(503, f"{name} cannot be stored for llama-server ({error.strerror})") from None
    return needs


def _stored(folder: Path) -> int:
    """Bytes of all files."""
    total = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # just removed
            total += file.stat().st_size
    return total


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _file(medium: Media, fetched: bytes | None, budget: Budget, name: str) -> bytes:
    """Raises RequestError."""
    text = medium.text
    try:
        if fetched is not None:
            data = fetched
        elif text[:5].lower() == "data:":
            data = pictures.from_data_url(text, budget, name)
        elif ":" in text[:16]:
            raise RequestError(400, "a picture must be a data: URL or base64")
        else:
            data = pictures.from_base64(text, budget, name)
        budget.check_file(len(data), name)
    except PictureError as error:
        raise _refused(error) from None
    return data


def _refused(error: PictureError) -> RequestError:
    return RequestError(413 if isinstance(error, PictureTooLarge) else 400, str(error))


def _pixels(data: bytes) -> int:
    """As its header says; 0 where there is none."""
    try:
        with Image.open(io.BytesIO(data), formats=pictures.FORMATS) as image:
            return image.width * image.height
    except Exception:  # decode() will say what is wrong
        return 0


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
