"""A picture as pixels, and the two ways in which a model gets it."""

from __future__ import annotations

import ctypes
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..digest import bytes_digest


@dataclass(frozen=True, eq=False)
class Picture:
    """rgb: uint8 [height, width, 3], contiguous and not to be written; name: what the user called it; data: the file it came from; warning: a line
    for the user when what is shown may not be what was meant, else ""."""

    name: str
    rgb: np.ndarray
    data: bytes = b""
    warning: str = ""

    @property
    def width(self) -> int:
        return self.rgb.shape[1]

    @property
    def height(self) -> int:
        return self.rgb.shape[0]

    @cached_property
    def digest(self) -> str:
        """Of what the projector is given: equal for equal pixels, whatever file they came in."""
        return bytes_digest(b"rgb %d %d" % (self.width, self.height), self.rgb.reshape(-1).data)


def new_bitmap(mtmd: Any, rgb: np.ndarray) -> Any:
    """An mtmd_bitmap with a copy of these pixels (uint8 [height, width, 3]); the caller frees it with mtmd_bitmap_free."""
    rgb = np.ascontiguousarray(rgb, np.uint8)
    height, width, _ = rgb.shape
    return mtmd.mtmd_bitmap_init(width, height, rgb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))


def to_png(rgb: np.ndarray) -> bytes:
    """A PNG file with exactly these pixels (uint8 [height, width, 3]), written quickly rather than small."""
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG", compress_level=1)
    return out.getvalue()


def write_ppm(path: Path, rgb: np.ndarray) -> None:
    """A file with exactly these pixels (uint8 [height, width, 3]), as they are. Raises OSError."""
    height, width, _ = rgb.shape
    with path.open("wb") as file:
        file.write(b"P6 %d %d 255\n" % (width, height))
        file.write(np.ascontiguousarray(rgb, np.uint8).data)
