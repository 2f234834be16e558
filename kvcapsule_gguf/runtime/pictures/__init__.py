"""Pictures, prepared once for every program: decoded, turned upright, on white, 8-bit RGB, within limits.

>>> budget = Budget()                                  # of one request or conversation
>>> picture = decode(read("photo.jpg"), budget, "photo.jpg")
>>> picture.rgb                                        # uint8 [height, width, 3]

Models get these pixels (`new_bitmap`, `to_png`, `write_ppm`), never the file. Raises PictureError, a ValueError whose text is one line for the user.
"""

from .decode import FORMATS, SUFFIXES, decode
from .dropped import split_dropped, split_listed, split_pasted, unquoted
from .limits import Budget, Limits, PictureError, PictureTooLarge
from .picture import Picture, new_bitmap, to_png, write_ppm
from .sources import from_base64, from_data_url, is_remote, load, read, short

__all__ = [
    "FORMATS", "SUFFIXES", "Budget", "Limits", "Picture", "PictureError", "PictureTooLarge", "decode", "from_base64", "from_data_url", "is_remote", "load",
    "new_bitmap", "read", "short", "split_dropped", "split_listed", "split_pasted", "to_png", "unquoted", "write_ppm",
]  # fmt: skip
