"""Pictures that are read or made when they are asked for: those of a folder here, drawn ones in train.images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ..runtime.errors import KVCapsuleError
from ..runtime.pictures import SUFFIXES, PictureError, load
from .vlm import EvalError


class UnreadablePicture(KVCapsuleError):
    """A file is not a picture; the text names it."""


@dataclass(frozen=True)
class Picture:
    """image: RGB; questions: what to ask about this picture, none: general ones; name: for messages;
    warning: when what is shown may not be what was meant."""

    image: Image.Image
    questions: tuple[str, ...] = ()
    name: str = ""
    warning: str = ""


class Pictures(Protocol):
    """A list, always the same picture at the same place; an item may raise UnreadablePicture."""

    @property
    def identity(self) -> str:
        """Other pictures have another one. Where it names them, a line each: a digest of the contents, and the name."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Picture: ...


@dataclass(frozen=True)
class Folder:
    """`files` in their order."""

    files: tuple[Path, ...]

    @property
    def identity(self) -> str:
        return "\n".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()} {p.name}" for p in self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Picture:
        file = self.files[i]
        try:
            found = load(str(file), name=str(file))
        except PictureError as error:
            raise UnreadablePicture(str(error)) from error
        return Picture(Image.fromarray(found.rgb), name=file.name, warning=found.warning)


def from_folder(folder: Path, count: int, seed: int) -> Folder:
    """At most `count` pictures of a folder and its sub-folders, chosen and ordered by the seed. Raises EvalError."""
    if not folder.is_dir():
        raise EvalError(f"{folder} is not a folder")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise EvalError(f"{folder} has no pictures ({', '.join(sorted(SUFFIXES))})")
    order = np.random.default_rng(seed).permutation(len(files))
    return Folder(tuple(files[i] for i in order[:count]))


def readable(pictures: Pictures, say: Callable[[str], None] = lambda line: None) -> Iterator[tuple[int, Picture]]:
    """Those that can be read, with their numbers; names the others, and warns."""
    for i in range(len(pictures)):
        try:
            picture = pictures[i]
        except UnreadablePicture as error:
            say(f"skipped: {error}")
            continue
        if picture.warning:
            say(picture.warning)
        yield i, picture
