"""Identity of files."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

WHOLE = 64 << 20  # larger files are sampled
SAMPLES, SAMPLE = 256, 1 << 16


def file_digest(path: Path) -> str:
    """Of the contents; of a large file: size, time of change, and samples all over it, since hashing many GiB takes longer than what is saved."""
    hasher = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        info = os.fstat(file.fileno())
        hasher.update(b"%d\n" % info.st_size)
        if info.st_size <= WHOLE:
            while piece := file.read(1 << 20):
                hasher.update(piece)
            return hasher.hexdigest()
        hasher.update(b"%d\n" % info.st_mtime_ns)
        for i in range(SAMPLES):
            file.seek(i * (info.st_size - SAMPLE) // (SAMPLES - 1))
            hasher.update(file.read(SAMPLE))
    return hasher.hexdigest()


def model_digest(path: Path) -> str:
    """Of all parts of a split model."""
    split = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\.gguf)", path.name)
    parts = sorted(path.parent.glob(f"{_literal(split[1])}?????{split[2]}")) if split else [path]
    return ",".join(file_digest(part) for part in parts)


def _literal(text: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", text)
