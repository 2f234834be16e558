"""Temporary folders that do not pile up: one whose process was killed, or lost its terminal, goes when the next one is made."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

PREFIX, LOCK = "kvcapsule-", ".kvcapsule-lock"


class Scratch:
    """A new folder, for the owner only. It goes when it is closed."""

    def __init__(self) -> None:
        """Raises OSError."""
        _sweep(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        # locked before it has its name, so that nobody finds it unlocked
        self._lock = os.open(self.path / f"{LOCK}.new", os.O_RDWR | os.O_CREAT, 0o600)
        _lock(self._lock)
        os.rename(self.path / f"{LOCK}.new", self.path / LOCK)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *exception: object) -> None:
        self.close()


def _sweep(folder: Path) -> None:
    """Removes what killed processes of this user have left: the kernel frees their locks."""
    for lock in folder.glob(f"{PREFIX}*/{LOCK}"):
        try:
            if lock.parent.is_symlink() or lock.parent.stat().st_uid != os.getuid():
                continue
            fd = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
        except (AttributeError, OSError):  # Windows has no owners; another sweep was faster
            continue
        try:
            if _lock(fd):
                shutil.rmtree(lock.parent, ignore_errors=True)
        finally:
            os.close(fd)


def _lock(fd: int) -> bool:
    """Whether it was free. It stays locked until it is closed, or the process ends in whatever way."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
