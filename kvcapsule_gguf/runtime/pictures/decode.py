"""A picture file as pixels.

A JPEG file that is cut short is shown as browsers show it, as far as its rows go and with a warning, unless it is progressive: what is left of such
a file may look like another picture. Every other file that is cut short is refused.
"""

from __future__ import annotations

import io
import logging
import threading
import warnings
from contextlib import nullcontext

import numpy as np
from PIL import Image, UnidentifiedImageError

from .levels import fix_transparent_colour, to_rgb
from .limits import Budget, PictureError, PictureTooLarge
from .picture import Picture

# Pillow knows more, but some of these start other programs (EPS) or unpack whole archives (ICO)
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm")  # usual names of such files
SHOWN = "JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF, PPM"
MAX_SCANS = 100  # of a progressive JPEG: real ones have about 10, and every scan takes time for the whole picture
END_OF_JPEG = b"\xff\xd9"
BLOCK_PIXELS = 16 * 16  # at most, of a JPEG
ORIENTATION, TILE_WIDTH, TILE_LENGTH = 0x0112, 322, 323

# large pictures are decoded one at a time, so that requests at once take the memory of one
LARGE_PIXELS = 4_000_000
# no projector looks at more, and a picture is kept as long as its conversation
KEPT_PIXELS = 4096 * 4096
_large = threading.Lock()
# what Pillow warns of (odd metadata, many pixels) is either harmless or refused here
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def decode(data: bytes, budget: Budget | None = None, name: str = "the picture") -> Picture:
    """The first frame, upright, on white, with at most KEPT_PIXELS. Colour profiles are ignored, as llama.cpp does. Sizes are checked before memory is taken; they count in
    `budget`. Raises PictureError, PictureTooLarge."""
    budget = budget or Budget()
    budget.check_file(len(data), name)
    try:
        with _open(data, budget, name) as image:
            budget.take(*image.size, name)
            with _large if image.width * image.height > LARGE_PIXELS else nullcontext():
                rgb, warning = _pixels(image, data)
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"{name}: not a picture that can be read ({SHOWN})") from None
    except MemoryError:
        raise PictureTooLarge(f"{name}: there is not enough memory for it: make it smaller") from None
    # Pillow raises many kinds for damaged files
    except Exception as error:
        raise PictureError(f"{name}: damaged picture ({' '.join(str(error).split()) or type(error).__name__})") from error
    rgb.flags.writeable = False
    return Picture(name, rgb, data, warning and f"{name}: {warning}")


def _open(data: bytes, budget: Budget, name: str) -> Image.Image:
    """The header is read. Raises PictureError, and what Pillow raises."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise PictureTooLarge(f"{name}: too large (at most {budget.limits.pixels / 1e6:g} million pixels are read): make it smaller") from None
    tags = getattr(image, "tag_v2", {})
    # a tile is unpacked whole, even where the picture is smaller
    budget.check_pixels(tags.get(TILE_WIDTH, 0), tags.get(TILE_LENGTH, 0), name)
    if image.info.get("progressive") and _scans(data) > MAX_SCANS:
        raise PictureError(f"{name}: damaged picture (more than {MAX_SCANS} scans)")
    return image


def _scans(data: bytes) -> int:
    """How many scans a JPEG has up to its end; cameras append videos, which may hold any bytes."""
    count = at = 0
    while (at := data.find(b"\xff", at)) >= 0 and (marker := data[at + 1 : at + 2]) not in (b"", END_OF_JPEG[1:]):
        if marker[0] in (0x00, 0x01, *range(0xD0, 0xD9)):  # a byte of the pixels, or a marker without data
            at += 2
        elif marker[0] == 0xFF:
            at += 1
        else:
            count += marker[0] == 0xDA
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return count


def _pixels(image: Image.Image, data: bytes) -> tuple[np.ndarray, str]:
    """uint8 [height, width, 3] and a warning or "". Raises what Pillow raises."""
    fix_transparent_colour(image)
    try:
        image.load()
    except OSError as error:
        if image.format not in ("JPEG", "MPO") or image.info.get("progressive") or "truncated" not in str(error):
            raise
        return _cut_jpeg(data, error), "its file is cut short, what is missing is grey"
    return _finished(image)


def _cut_jpeg(data: bytes, error: OSError) -> np.ndarray:
    """With an end put to it, the decoder gives what there is. Raises `error` if that is nothing."""
    with Image.open(io.BytesIO(data + END_OF_JPEG), formats=["JPEG"]) as image:
        image.load()
        rgb, _ = _finished(image)
    # without any data the decoder still makes up one block
    if np.count_nonzero((rgb != 128).any(-1)) <= min(BLOCK_PIXELS, rgb.shape[0] * rgb.shape[1] - 1):
        raise error
    return rgb


def _finished(image: Image.Image) -> tuple[np.ndarray, str]:
    rgb, warning = to_rgb(image)
    orientation = _orientation(image)
    image.close()  # its memory is needed no more
    return _upright(_smaller(rgb), orientation), warning


def _smaller(rgb: np.ndarray) -> np.ndarray:
    """At most KEPT_PIXELS, each the mean of those it stands for."""
    height, width, _ = rgb.shape
    scale = (KEPT_PIXELS / (width * height)) ** 0.5
    if scale >= 1:
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BOX))


def _orientation(image: Image.Image) -> int:
    """1 to 8 as EXIF counts them; 1 is upright."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata say nothing about the pixels
        return 1


def _upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (5, 6, 7, 8):
        rgb = rgb.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    return np.ascontiguousarray(rgb)
