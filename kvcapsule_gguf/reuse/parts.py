"""A prompt, or what a KV cache holds, as a list of items: text tokens, and pictures by their identity.

Placeholder tokens never stand for a picture: two pictures of the same size have the same placeholders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class ImagePart:
    """A picture, or one slice of a large one. digest: of its contents and its place among the slices (hex); n_tokens: cells, which M-RoPE models
    do not use as many positions for."""

    digest: str
    n_pos: int
    n_tokens: int


Item: TypeAlias = int | ImagePart


def positions(items: Iterable[Item]) -> int:
    return sum(item.n_pos if isinstance(item, ImagePart) else 1 for item in items)


def cells(items: Iterable[Item]) -> int:
    return sum(item.n_tokens if isinstance(item, ImagePart) else 1 for item in items)


def common(held: Sequence[Item], wanted: Sequence[Item]) -> int:
    """How many leading items are the same."""
    n = 0
    for a, b in zip(held, wanted):
        if a != b:
            break
        n += 1
    return n


def prefix_keys(binding: bytes, items: Sequence[Item]) -> Iterator[tuple[int, str]]:
    """(length, key) of each prefix that ends with a picture. What a picture leaves in the cache depends on everything before it, hence the whole prefix."""
    running = hashlib.blake2b(binding, digest_size=32)
    for index, item in enumerate(items):
        if isinstance(item, ImagePart):
            running.update(f"image {item.digest} {item.n_pos} {item.n_tokens}\n".encode())
            yield index + 1, running.hexdigest()
        else:
            running.update(b"%d\n" % item)


def to_json(items: Sequence[Item]) -> list[object]:
    return [[item.digest, item.n_pos, item.n_tokens] if isinstance(item, ImagePart) else item for item in items]


def from_json(values: object) -> list[Item]:
    """Raises ValueError."""
    if not isinstance(values, list):
        raise ValueError("not a list of items")
    return [_item(value) for value in values]


def _item(value: object) -> Item:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], str) and all(isinstance(n, int) and n > 0 for n in value[1:]):
        return ImagePart(*value)
    raise ValueError("not an item of a prompt")
