"""What every part of the package says about a capsule file: its error, and the model that it is for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import CapsuleError

ROPE_TYPES = ("none", "norm", "neox", "mrope", "imrope")
GRID_ROPE_TYPES = ("mrope", "imrope")  # positions tell the place of a token in its image


class CapsuleFileError(CapsuleError):
    """A file that can not be used: one line naming it, the key or tensor, and the reason."""

    what = "capsule"

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{self.what} '{_printable(str(path))}': {_printable(reason)}")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


@dataclass
class Base:
    """The model a capsule is for."""

    architecture: str
    block_count: int
    fingerprint: str
    rope_type: str = "norm"
    rope_sections: tuple[int, int, int, int] = (0, 0, 0, 0)
