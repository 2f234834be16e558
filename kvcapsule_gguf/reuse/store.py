"""A directory of containers, bounded in size: the least recently used go first. Several processes may share it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: two writers at once may overshoot the limit
    fcntl = None  # type: ignore[assignment]

from . import container
from .container import Blob, Damaged

ENTRY = re.compile(r"[0-9a-f]{64}\.kvstate")
SCRATCH = re.compile(r"\.[0-9a-f]{64}\.kvstate\.(\d+)-[0-9a-f]+\.tmp")


class Store:
    """Only files with names of our own are ever counted or removed, so that a wrong DIR costs nothing."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Raises OSError when the folder cannot be made."""
        self.folder = folder
        self.max_bytes = max_bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep()

    def get(self, key: str) -> tuple[dict[str, Any], list[memoryview]] | None:
        """None if it is not there, or not whole (then it is removed)."""
        path = self._path(key)
        try:
            found = container.read(path, self.max_bytes)
            with suppress(OSError):  # a folder for reading only
                os.utime(path)
            return found
        except FileNotFoundError:
            return None
        except (OSError, Damaged, MemoryError):
            self.drop(key)
            return None

    def put(self, key: str, header: dict[str, Any], blobs: Sequence[Blob]) -> bool:
        """False if it is larger than the whole store may be. Raises OSError (a full disk)."""
        size = container.size_of(header, blobs)
        if size > self.max_bytes:
            return False
        with self._alone():
            self._make_room(size, key)
            container.write(self._path(key), header, blobs)
        return True

    def drop(self, key: str) -> None:
        with suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer at a time, so that all of them together keep the limit."""
        if fcntl is None:
            yield
            return
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # file systems without locks
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def n_bytes(self) -> int:
        return sum(size for _, size, _ in self._entries())

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.kvstate"

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path), oldest first."""
        entries = []
        for path in self.folder.iterdir():
            if ENTRY.fullmatch(path.name):
                try:
                    info = path.stat()
                except OSError:
                    continue  # another process removed it
                entries.append((info.st_mtime, info.st_size, path))
        return sorted(entries)

    def _make_room(self, size: int, key: str) -> None:
        entries = [entry for entry in self._entries() if entry[2] != self._path(key)]
        total = sum(n for _, n, _ in entries)
        for _, n, path in entries:
            if total + size <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= n

    def _sweep(self) -> None:
        """Removes what a killed process left half written."""
        for path in self.folder.iterdir():
            if (match := SCRATCH.fullmatch(path.name)) and not _alive(int(match[1])):
                with suppress(OSError):
                    path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # ours are gone: an earlier process had the same number
    if os.name == "nt":
        return True  # no harmless way to ask; the next free number sweeps it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
