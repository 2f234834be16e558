"""The earlier name of runtime.pictures, for what has not moved yet."""

from ..runtime import pictures
from ..runtime.pictures import Picture, load, read  # noqa: F401
from ..runtime.pictures import PictureError as ImageError  # noqa: F401


def decode(data: bytes, name: str) -> Picture:
    return pictures.decode(data, None, name)
