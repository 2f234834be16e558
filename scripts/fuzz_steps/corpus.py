"""The inputs of a target: the committed seeds, and in one archive what fuzzing has found since, minimized."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from .build import HARNESSES, OUT, ROOT, FuzzError

SEEDS = HARNESSES / "corpus"
ATTACKS = ROOT / "tests" / "attacks" / "files"


def archive(target: str) -> Path:
    return SEEDS / f"{target}-found.tar.xz"


def folders(target: str) -> list[Path]:
    """The first takes new inputs, the others are committed."""
    committed = {"capsule": [SEEDS / target, ATTACKS], "context": []}  # the seeds of `context` are written by the harness itself
    return [_grown(target), *committed.get(target, [SEEDS / target])]


def _grown(target: str) -> Path:
    """Starts with what the archive holds."""
    folder = OUT / "corpus" / target
    if not folder.is_dir():
        folder.mkdir(parents=True)
        if archive(target).is_file():
            with tarfile.open(archive(target)) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    if file is not None:
                        (folder / Path(member.name).name).write_bytes(file.read())
    return folder


def minimize(target: str, program: Path) -> int:
    """Writes the archive: of all inputs those that reach code that no other does. Returns their number. Needs libFuzzer."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder)
        for path in [p for seeds in folders(target)[1:] for p in seeds.iterdir()]:
            shutil.copy(path, kept / f"seed-{path.name}")
        command = [program, "-merge=1", "-use_counters=0", kept, *folders(target)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            raise FuzzError(f"{target}: the corpus could not be minimized")
        found = sorted(p for p in kept.iterdir() if not p.name.startswith("seed-"))
        with tarfile.open(archive(target), "w:xz") as tar:
            for path in found:
                info = tarfile.TarInfo(path.name)  # no times and owners: the same inputs are the same archive
                info.size = path.stat().st_size
                tar.addfile(info, io.BytesIO(path.read_bytes()))
    return len(found)
