"""A file with a JSON header, blobs and a checksum: written whole or not at all, and never believed unchecked."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

from ..runtime.errors import KVCapsuleError

MAGIC = b"KVCSTATE"
VERSION = 1
PREFIX = struct.Struct("<8sII")  # magic, version, length of the header
MAX_HEADER = 64 << 20
CHECKSUM = 32

Blob = Union[bytes, bytearray, memoryview]


class Damaged(KVCapsuleError):
    """Not such a file, cut, or changed; one line."""


def size_of(header: dict[str, Any], blobs: Sequence[Blob]) -> int:
    return PREFIX.size + len(_header(header, blobs)) + sum(map(len, blobs)) + CHECKSUM


def write(path: Path, header: dict[str, Any], blobs: Sequence[Blob]) -> None:
    """Readable by the owner only; under its name it appears complete, also after kill -9. Raises OSError."""
    head = _header(header, blobs)
    hasher = hashlib.blake2b(digest_size=CHECKSUM)
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(fd, "wb") as file:
            for piece in (PREFIX.pack(MAGIC, VERSION, len(head)), head, *blobs):
                hasher.update(piece)
                file.write(piece)
            file.write(hasher.digest())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def read(path: Path) -> tuple[dict[str, Any], list[memoryview]]:
    """Raises Damaged, OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = bytearray(size)
        if file.readinto(data) != size or size < PREFIX.size + CHECKSUM:
            raise Damaged(f"{path} is cut off")
    view = memoryview(data)
    magic, version, length = PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise Damaged(f"{path} is not a saved state")
    if version != VERSION:
        raise Damaged(f"{path} has version {version}, this program reads {VERSION}")
    body, checksum = view[:-CHECKSUM], view[-CHECKSUM:]
    if hashlib.blake2b(body, digest_size=CHECKSUM).digest() != checksum:
        raise Damaged(f"{path} is damaged (its checksum does not fit)")
    try:
        if length > MAX_HEADER:
            raise ValueError("the header is too long")
        header = json.loads(bytes(body[PREFIX.size : PREFIX.size + length]))
        sizes = [int(n) for n in header.pop("blobs")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is damaged ({error})") from None
    at, blobs = PREFIX.size + length, []
    if min(sizes, default=0) < 0 or at + sum(sizes) != len(body):
        raise Damaged(f"{path} is damaged (its parts do not fill it)")
    for n in sizes:
        blobs.append(body[at : at + n])
        at += n
    return header, blobs


def _header(header: dict[str, Any], blobs: Sequence[Blob]) -> bytes:
    return json.dumps({**header, "blobs": list(map(len, blobs))}).encode()
