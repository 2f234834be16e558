"""The pinned llama.cpp, unpatched: from the source distribution of llama-cpp-python, or from a checkout of the same commit."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

from . import environment, pins
from .common import CACHE, LLAMA, SetupError, say, sha256

# large, and not needed to build
SKIPPED = {".git", "docs", "media", "models", ".devops", ".github"}

PRISTINE = LLAMA / "stock" / "source"
ORIGIN = LLAMA / "stock" / "origin"  # written last, so it also says that the tree is whole


def sdist() -> Path:
    """The source distribution in .cache/, fetched with pip when it is not there. Raises SetupError when it is not the pinned file."""
    path = CACHE / pins.SDIST_NAME
    if not path.is_file():
        say(f"fetching the source of llama-cpp-python {pins.LLAMA_CPP_PYTHON}")
        wanted = f"llama-cpp-python=={pins.LLAMA_CPP_PYTHON}"
        environment.pip("download", "download", "--no-deps", "--no-binary", ":all:", "-d", CACHE, wanted)
        if not path.is_file():
            raise SetupError(f"pip did not fetch {pins.SDIST_NAME}; put that file into .cache/ and run scripts/setup again")
    if (found := sha256(path)) != pins.SDIST_SHA256:
        raise SetupError(f".cache/{path.name} has sha256 {found}, not the pinned {pins.SDIST_SHA256}: delete it and run scripts/setup again")
    return path


def pristine(archive: Path, checkout: Path | None) -> Path:
    """The unpatched tree in .cache/, made when it is missing or when another checkout is asked for (the files are the same from anywhere)."""
    origin = f"checkout {checkout.resolve()}" if checkout else f"sdist {pins.SDIST_SHA256}"
    if ORIGIN.is_file() and (not checkout or ORIGIN.read_text() == origin):
        return PRISTINE
    if checkout:
        check_identity(checkout)
    ORIGIN.unlink(missing_ok=True)
    scratch = PRISTINE.with_name("source.new")
    shutil.rmtree(scratch, ignore_errors=True)
    if checkout:
        say(f"copying llama.cpp {pins.LLAMA_CPP_REV} from {checkout}")
        shutil.copytree(checkout, scratch, symlinks=True, ignore=lambda folder, names: SKIPPED.intersection(names) if Path(folder) == checkout else ())
    else:
        say(f"unpacking llama.cpp {pins.LLAMA_CPP_REV}")
        _unpack(archive, scratch)
    check_identity(scratch)
    shutil.rmtree(PRISTINE, ignore_errors=True)
    os.replace(scratch, PRISTINE)
    ORIGIN.write_text(origin)
    return PRISTINE


def check_identity(tree: Path) -> None:
    """Raises SetupError unless `tree` is the pinned commit of llama.cpp, without patches."""
    if not (tree / "include" / "llama.h").is_file():
        raise SetupError(f"{tree} is not a llama.cpp source tree (no include/llama.h)")
    if (tree / "include" / "llama-capsule.h").exists():
        raise SetupError(f"{tree} is patched already (include/llama-capsule.h exists): give an unpatched checkout of {pins.LLAMA_CPP_REV}")
    for name, digest in pins.IDENTITY.items():
        if not (tree / name).is_file() or sha256(tree / name) != digest:
            raise SetupError(f"{tree} is not llama.cpp {pins.LLAMA_CPP_REV} as published: {name} differs (another commit, or changed by hand)")


def _unpack(archive: Path, target: Path) -> None:
    prefix = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
    with tarfile.open(archive) as tar:
        members = []
        for member in tar:
            inside = member.name.removeprefix(prefix)
            # vendor/llama.cpp/.git is a file that points into a repository that is not there: git would fail on it
            if inside == member.name or inside.split("/")[0] in SKIPPED or not (member.isfile() or member.isdir()):
                continue
            member.name = inside
            members.append(member)
        # the hash of the archive is pinned; the filter is for Pythons that warn without one
        options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(target, members=members, **options)
