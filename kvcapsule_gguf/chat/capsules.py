"""Which capsule a loaded model gets: a file that is named or fits, the built-in one, or none."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import native
from ..codec.quality import QUALITY
from ..format.base_model import read_base_model
from ..format.fingerprint import fingerprint_of
from ..runtime.errors import CapsuleError
from . import files

VARIABLE = "LLAMA_KVCAPSULE"


@dataclass(frozen=True)
class Chosen:
    """path: of a file, None = built in. Without a capsule `reason` says why; optional: where a context cannot have it, it goes without."""

    capsule: native.Capsule | None
    path: Path | None = None
    optional: bool = False
    reason: str = ""


def from_variables(setting: str, environ: Mapping[str, str]) -> str:
    """`auto` gives way to the variable for programs that know nothing of capsules, whose own `auto` is the built-in capsule here as there."""
    named = environ.get(VARIABLE)
    if setting != files.AUTO or not named:
        return setting
    return files.NO_FILE if named == files.AUTO else named


def check_amount(parser: ArgumentParser, options: Any, typed: Collection[str]) -> None:
    """--quality, --ratio and --capsule off. typed: what the command line has; it wins over variables, also over those of the other flag."""
    given = [name for name in ("quality", "ratio") if name in typed]
    if len(given) == 1:
        setattr(options, "ratio" if given == ["quality"] else "quality", None)
    if options.quality and options.ratio:
        parser.error("give --quality or --ratio, not both: a ratio is one tier for everything")
    if given and options.capsule == "off":
        parser.error(f"--{given[0]} says how much a capsule saves, and --capsule off says that there is none: leave one of them out")


def choose(setting: str, handle: int, model: Path, mmproj: Path | None, architecture: str) -> Chosen:
    """handle: the loaded model. Raises KVCapsuleError."""
    optional = setting in (files.AUTO, files.NO_FILE)
    try:
        path = None if setting in (files.BUILT_IN, files.NO_FILE) else files.find_capsule(setting, model, mmproj, architecture, native.fingerprint(handle))
        builtin = native.Capsule.builtin(handle) if path is None else None
    except CapsuleError as error:
        if not optional:
            raise
        return Chosen(None, reason=str(error))
    return Chosen(native.Capsule.load(handle, path) if path is not None else builtin, path, optional)


def beside(model: Path, mmproj: Path | None) -> Path | None:
    """The file that `auto` means, of a model that is not loaded; None: the built-in capsule. Raises KVCapsuleError."""
    base = read_base_model(model)
    return files.find_capsule(files.AUTO, model, mmproj, base.architecture, fingerprint_of(base))


def described(path: Path | None, quality: float | None, ratio: float | None) -> str:
    """A line for people; path None: the built-in capsule."""
    info = files.read_info(path) if path else None
    amount = f", ratio {ratio:g}" if ratio else f", quality {quality or QUALITY:g}" if info is None or info.version > 1 else ""
    return f"capsule: {path.name}{amount}" if path else f"capsule: built in{amount}; one from kvcapsule-train saves more"


def uncompressed(reason: str) -> str:
    return f"no capsule, pictures stay uncompressed: {reason}"
