"""Pictures: anything Pillow reads, from a path, an http(s) or data URL, or stdin."""

from __future__ import annotations

import base64
import binascii
import io
import sys
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageOps

from ..reuse.digest import bytes_digest
from ..runtime.errors import KVCapsuleError

MAX_BYTES = 64 << 20
TIMEOUT_S = 30


class ImageError(KVCapsuleError):
    """A picture cannot be read."""


@dataclass(frozen=True)
class Picture:
    """rgb: height * width * 3 bytes; name: what the user called it; data: the file it came from."""

    name: str
    width: int
    height: int
    rgb: bytes
    data: bytes = b""

    @cached_property
    def digest(self) -> str:
        """Of what the projector is given: equal for equal pixels, whatever file they came in."""
        return bytes_digest(b"rgb %d %d" % (self.width, self.height), self.rgb)


def load(source: str) -> Picture:
    """Raises ImageError."""
    name = _short(source)
    return decode(read(source), name)


def decode(data: bytes, name: str) -> Picture:
    """Raises ImageError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            # the orientation a camera noted; then the first frame, on white where it is transparent
            rgb = _on_white(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture that can be read") from None
    # Pillow raises many kinds for damaged files
    except Exception as error:
        raise ImageError(f"{name}: damaged picture ({' '.join(str(error).split()) or type(error).__name__})") from error
    return Picture(name, rgb.width, rgb.height, rgb.tobytes(), data)


def _short(source: str) -> str:
    return source if len(source) <= 80 else source[:77] + "..."


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16 bits a channel: convert("RGB") would clip to white
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data if hasattr(image, "has_transparency_data") else "A" in image.getbands():
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def read(source: str) -> bytes:
    """The bytes of a path, an http(s) or data URL, or stdin (-). Raises ImageError."""
    name = _short(source)
    if source == "-":
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
    elif source.startswith("data:"):
        data = _data_url(source, name)
    elif source.startswith(("http://", "https://")):
        data = _http(source, name)
    else:
        try:
            path = Path(source).expanduser()
            if path.is_dir():
                raise ImageError(f"{name}: is a folder, not a picture")
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, ValueError, RuntimeError) as error:
            raise ImageError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if not data:
        raise ImageError(f"{name}: empty")
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name}: larger than {MAX_BYTES >> 20} MiB")
    return data


def _data_url(source: str, name: str) -> bytes:
    head, comma, body = source.partition(",")
    if not comma:
        raise ImageError(f"{name}: data URL without data")
    if not head.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    try:
        return base64.b64decode(urllib.parse.unquote(body), validate=True)
    except (binascii.Error, ValueError):
        raise ImageError(f"{name}: data URL with broken base64") from None


def _http(source: str, name: str) -> bytes:
    request = urllib.request.Request(source, headers={"User-Agent": "kvcapsule-chat"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return response.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ImageError(f"{name}: HTTP {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: {getattr(error, 'reason', None) or error}") from None
