"""Puts the patch series on llama.cpp.

The patched tree is not edited step by step: what every touched file must contain is computed from the pristine tree, and then written where it differs. So it
can be run again at any time, a changed series needs no fresh start, files that stay equal keep their mtime (and their objects), and there is no half-patched state.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .common import SetupError, say, write_if_changed

STAMP = ".kvcapsule-tree.json"  # in the patched tree: hash of each file we wrote there, None for a removed one


@dataclass(frozen=True)
class Series:
    """patches/NNNN-*.patch in order, and the new files below patches/files/."""

    patches: tuple[Path, ...]
    files: dict[str, Path]

    @classmethod
    def read(cls, folder: Path) -> Series:
        root = folder / "files"
        files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
        return cls(tuple(sorted(folder.glob("[0-9][0-9][0-9][0-9]-*.patch"))), files)

    def digest(self) -> str:
        digest = hashlib.sha256()
        for name, path in [(path.name, path) for path in self.patches] + sorted(self.files.items()):
            data = path.read_bytes()
            digest.update(f"{name}\n{len(data)}\n".encode() + data)
        return digest.hexdigest()


def touched(patch: Path) -> set[str]:
    """Paths that a patch changes, adds or removes."""
    lines = patch.read_text(errors="surrogateescape").splitlines()
    names = set()
    for old, new, hunk in zip(lines, lines[1:], lines[2:]):
        if old.startswith("--- ") and new.startswith("+++ ") and hunk.startswith("@@ "):
            for line, prefix in ((old, "a/"), (new, "b/")):
                name = line[4:].split("\t")[0]
                if name != "/dev/null":
                    if not name.startswith(prefix):
                        raise SetupError(f"{patch.name}: expected paths with a/ and b/ in front, found {name}")
                    names.add(name[2:])
    return names


def render(series: Series, pristine: Path) -> dict[str, bytes | None]:
    """What each touched file must contain; None = it must not exist. Raises SetupError when a patch does not fit exactly."""
    names = set().union(*map(touched, series.patches)) if series.patches else set()
    with tempfile.TemporaryDirectory(prefix="kvcapsule-") as folder:
        work = Path(folder)
        for name in names:
            if (pristine / name).is_file():
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(pristine / name, work / name)
        for patch in series.patches:
            _apply(patch, work)
        contents: dict[str, bytes | None] = {name: (work / name).read_bytes() if (work / name).is_file() else None for name in names}
    for name, path in series.files.items():
        if (pristine / name).exists() or contents.get(name) is not None:
            raise SetupError(f"patches/files/{name} would replace a file of llama.cpp: change that file with a patch instead")
        contents[name] = path.read_bytes()
    return contents


def sync(series: Series, pristine: Path, tree: Path) -> bool:
    """Makes `tree` the pristine tree with the series on it. True if anything changed. Raises SetupError for a tree that is not ours or was edited."""
    stamp = tree / STAMP
    origin = (pristine.parent / "origin").read_text() if (pristine.parent / "origin").is_file() else str(pristine)
    if tree.exists() and not stamp.is_file():
        raise SetupError(f"{tree} was not made by scripts/setup or is incomplete: delete it and run scripts/setup again")
    if stamp.is_file():
        state = json.loads(stamp.read_text())
        _refuse_edits(tree, state["files"])
        if state["origin"] != origin:
            shutil.rmtree(tree)
        elif state["digest"] == series.digest():
            return False
    contents = render(series, pristine)
    if not tree.exists():
        scratch = tree.with_name(tree.name + ".new")
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(pristine, scratch, symlinks=True)
        _write_stamp(scratch, origin, "", {})
        os.replace(scratch, tree)
    before = json.loads(stamp.read_text())["files"]
    # a file that an older series touched goes back to what it was
    for name in before.keys() - contents.keys():
        contents[name] = (pristine / name).read_bytes() if (pristine / name).is_file() else None
    # until all is written, any of these may hold its old or its new content
    _write_stamp(tree, origin, "", dict.fromkeys(contents, "*"))
    changed = [name for name, data in contents.items() if _put(tree / name, data)]
    _write_stamp(tree, origin, series.digest(), {name: _hash(data) for name, data in contents.items()})
    say(f"llama.cpp patched: {len(series.patches)} patches, {len(series.files)} new files, {len(changed)} files changed")
    return True


def _put(path: Path, data: bytes | None) -> bool:
    if data is not None:
        return write_if_changed(path, data)
    existed = path.exists()
    path.unlink(missing_ok=True)
    return existed


def _hash(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _write_stamp(tree: Path, origin: str, digest: str, files: dict[str, str | None]) -> None:
    text = json.dumps({"origin": origin, "digest": digest, "files": files}, indent=1, sort_keys=True)
    write_if_changed(tree / STAMP, text.encode())


def _refuse_edits(tree: Path, files: dict[str, str | None]) -> None:
    for name, wanted in files.items():
        path = tree / name
        if wanted != "*" and _hash(path.read_bytes() if path.is_file() else None) != wanted:
            raise SetupError(f"{path} was edited by hand: move the change into patches/, delete {tree} and run scripts/setup again")


def _apply(patch: Path, work: Path) -> None:
    """Applies one patch without fuzz, with git or with patch."""
    if shutil.which("git"):
        command = ["git", "apply", "--whitespace=nowarn", str(patch)]
    elif shutil.which("patch"):
        command = ["patch", "-p1", "--fuzz=0", "--batch", "--no-backup-if-mismatch", "-i", str(patch)]
    else:
        raise SetupError("git (or patch) is needed to apply the patches: install git")
    # inside a repository git apply skips paths outside of it without a word
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(work.parent)}
    result = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
    if result.returncode != 0:
        reason = " ".join((result.stderr + result.stdout).split())
        raise SetupError(f"{patch.name} does not apply to the pinned llama.cpp: {reason}")
