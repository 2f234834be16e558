"""What pictures may cost, for one picture and for a whole request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from .picture import Picture


class PictureError(InputError):
    """A picture cannot be read. The text is one clear line for the user."""


class PictureTooLarge(PictureError):
    """A picture, or all of them together, exceed a limit."""


@dataclass(frozen=True)
class Limits:
    """file_bytes: of one file; pixels: of one picture; total_pixels and count: of all pictures of a request or conversation.

    Decoding takes up to 16 bytes a pixel for a moment, and 3 bytes a pixel for as long as the picture is kept."""

    file_bytes: int = 64 << 20
    pixels: int = 100_000_000
    total_pixels: int = 400_000_000
    count: int = 256


@dataclass
class Budget:
    """What the pictures of one request or conversation have used of their limits."""

    limits: Limits = field(default_factory=Limits)
    pixels: int = 0
    count: int = 0

    @classmethod
    def after(cls, pictures: Iterable[Picture], limits: Limits | None = None) -> Budget:
        """What is left beside the pictures that are there already."""
        sizes = [picture.width * picture.height for picture in pictures]
        return cls(limits or Limits(), sum(sizes), len(sizes))

    def check_file(self, size: int, name: str) -> None:
        """size: bytes. Raises PictureTooLarge."""
        if size > self.limits.file_bytes:
            raise PictureTooLarge(f"{name}: larger than {self.limits.file_bytes / 2**20:g} MiB")

    def check_pixels(self, width: int, height: int, name: str) -> None:
        """Raises PictureTooLarge for a single picture that is too large."""
        if width * height > self.limits.pixels:
            raise PictureTooLarge(f"{name}: too large ({width} x {height} pixels, at most {self.limits.pixels / 1e6:g} million are read): make it smaller")

    def take(self, width: int, height: int, name: str) -> None:
        """Counts a picture that is about to be decoded. Raises PictureTooLarge."""
        self.check_pixels(width, height, name)
        if self.count >= self.limits.count:
            raise PictureTooLarge(f"{name}: more than {self.limits.count} pictures: send fewer")
        if self.pixels + width * height > self.limits.total_pixels:
            raise PictureTooLarge(f"{name}: the pictures have more than {self.limits.total_pixels / 1e6:g} million pixels together: make them smaller, or send fewer")
        self.count += 1
        self.pixels += width * height
