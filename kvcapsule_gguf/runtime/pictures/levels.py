"""Pixels of any mode and depth as 8-bit RGB on white.

Integers of up to 16 bits have a range by their type, and keep their 8 upper bits. Floats and integers of 32 bits, and signed ones, have none: they are
taken to lie in the smallest of 0..1 (floats only), 0..255 and 0..65535 that holds them all; if none does, their own least and greatest value become
black and white.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFile

BAND_PIXELS = 1 << 20  # what is converted at a time, so that little memory is needed beside the result


def to_rgb(image: Image.Image) -> tuple[np.ndarray, str]:
    """A loaded picture as uint8 [height, width, 3], and a warning or "". Raises what Pillow raises."""
    width, height = image.size
    span = _value_range(image)
    warning = ""
    if span is not None and span != (0, 1):
        warning = f"its file does not say what is black and what is white: its values are taken as {span[0]:.10g} to {span[1]:.10g}"
    rgb = np.empty((height, width, 3), np.uint8)
    rows = max(1, BAND_PIXELS // width)
    for y in range(0, height, rows):
        band = image.crop((0, y, width, min(y + rows, height)))
        rgb[y : y + rows] = _grey(band, span) if span is not None else _deep(image, band) if band.mode.startswith("I") else _on_white(band)
    if _white_is_zero(image):
        np.subtract(255, rgb, out=rgb)
    return rgb, warning


def fix_transparent_colour(image: Image.Image) -> None:
    """Pillow compares the one transparent colour of a PNG, which counts in the file's depth, with 8-bit pixels. To be called before the pixels are loaded."""
    colour = image.info.get("transparency")
    if not isinstance(image, ImageFile.ImageFile) or image.format != "PNG" or not image.tile or image.mode not in ("L", "RGB"):
        return
    raw = str(image.tile[0].args)
    if isinstance(colour, int):
        image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}.get(raw, 1)
    elif isinstance(colour, tuple) and ";16" in raw:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _on_white(band: Image.Image) -> np.ndarray:
    if not band.has_transparency_data:
        return np.asarray(band.convert("RGB"))
    if band.mode == "La":
        band = band.convert("LA")  # Pillow knows no direct way
    rgba = np.asarray(band.convert("RGBA")).astype(np.uint16)
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    # in whole numbers, so that nothing of what is fully transparent is left
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _deep(image: Image.Image, band: Image.Image) -> np.ndarray:
    """Grey of 9 to 16 bits."""
    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(258, (16,)))
    values = np.asarray(band).astype(np.uint16)
    grey = (values >> (bits - 8)).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return grey[..., None]


def _value_range(image: Image.Image) -> tuple[float, float] | None:
    """(black, white); None where the mode or the file says it."""
    if image.mode not in ("I", "F") or (image.mode, image.format) == ("I", "PPM"):  # Pillow brings those of a PPM file to 16 bits
        return None
    values = np.asarray(image)
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    for top in (1, 255, 65535):
        if low >= 0 and high <= top and (top > 1 or image.mode == "F"):
            return 0, top
    return low, high


def _grey(band: Image.Image, span: tuple[float, float]) -> np.ndarray:
    low, high = span
    values = np.asarray(band).astype(np.float64)
    grey = np.nan_to_num((values - low) * (255 / (high - low or 1)), nan=0, posinf=255, neginf=0)
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)[..., None]


def _white_is_zero(image: Image.Image) -> bool:
    """TIFF files may count from white; Pillow knows it for 8 bits only."""
    return image.mode in ("I", "F", "I;16", "I;16B") and getattr(image, "tag_v2", {}).get(262) == 0
