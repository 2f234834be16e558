"""A file with a JSON header, blobs and a checksum: written whole or not at all, and never believed unchecked."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import struct
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

from ..runtime.errors import KVCapsuleError

MAGIC = b"KVCSTATE"
VERSION = 1
PREFIX = struct.Struct("<8sII")  # magic, version, length of the header
MAX_HEADER = 64 << 20
CHECKSUM = 32

Blob: TypeAlias = bytes | bytearray | memoryview


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


def read(path: Path, most: int | None = None) -> tuple[dict[str, Any], list[memoryview]]:
    """most: bytes that it may have. Raises Damaged, OSError."""
    with _open(path) as file:
        head, header, sizes = _start(path, file, most)
        data = bytearray(sum(sizes) + CHECKSUM)
        if file.readinto(data) != len(data):
            raise Damaged(f"{path} is cut off")
    view = memoryview(data)
    body, checksum = view[:-CHECKSUM], view[-CHECKSUM:]
    hasher = hashlib.blake2b(head, digest_size=CHECKSUM)
    hasher.update(body)
    if hasher.digest() != checksum:
        raise Damaged(f"{path} is damaged (its checksum does not fit)")
    at, blobs = 0, []
    for n in sizes:
        blobs.append(body[at : at + n])
        at += n
    return header, blobs


def kind(path: Path) -> str | None:
    """What a container says that it is, unchecked; None: it is none. Raises OSError."""
    try:
        with _open(path) as file:
            return str(_start(path, file)[1].get("kind"))
    except Damaged:
        return None


def _open(path: Path) -> BufferedReader:
    """A pipe in the place of a file is not waited for. Raises Damaged, OSError."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Damaged(f"{path} is not a file")
    return open(fd, "rb")


def _start(path: Path, file: BufferedReader, most: int | None = None) -> tuple[bytes, dict[str, Any], list[int]]:
    """All before the blobs, the header in it, the sizes of the blobs. Raises Damaged."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(PREFIX.size)
    if len(prefix) < PREFIX.size:
        raise Damaged(f"{path} is cut off")
    magic, version, length = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise Damaged(f"{path} is not a saved state")
    if version != VERSION:
        raise Damaged(f"{path} has version {version}, this program reads {VERSION}")
    if most is not None and size > most:
        raise Damaged(f"{path} is larger than {most} bytes")
    try:
        if length > min(MAX_HEADER, size):
            raise ValueError("the header is too long")
        text = file.read(length)
        header = json.loads(text)
        sizes = [int(n) for n in header.pop("blobs")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise Damaged(f"{path} is damaged ({error})") from None
    if min(sizes, default=0) < 0 or PREFIX.size + length + sum(sizes) + CHECKSUM != size:
        raise Damaged(f"{path} is damaged (its parts do not fill it)")
    return prefix + text, header, sizes


def _header(header: dict[str, Any], blobs: Sequence[Blob]) -> bytes:
    return json.dumps({**header, "blobs": list(map(len, blobs))}).encode()
