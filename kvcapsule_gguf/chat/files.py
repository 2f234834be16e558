"""Which projector and which capsule belong to a model file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..format.gguf_header import GGUFError, read_header
from ..runtime.errors import KVCapsuleError
from .hub import _likeness

MAGIC = b"GGUF"
AUTO = "auto"  # a file that fits, else the built-in capsule
BUILT_IN = "built-in"  # the capsule that needs no file
NO_FILE = "LLAMA_KVCAPSULE=auto"  # as auto, but no file is looked for


@dataclass(frozen=True)
class CapsuleInfo:
    """What a file says about the model its capsule is for; damaged: its header cannot be read."""

    path: Path
    architecture: str = ""
    fingerprint: str = ""
    version: int = 0
    damaged: bool = False

    def fits(self, architecture: str, fingerprint: str) -> bool:
        if self.fingerprint and fingerprint:
            return self.fingerprint == fingerprint
        return self.architecture == architecture


def check_model(path: Path) -> Path:
    """Raises KVCapsuleError unless this is a GGUF file that can be the model."""
    check_file(path, "the model")
    if is_mmproj(path) or is_capsule(path):
        raise KVCapsuleError(f"{path} is {'a projector' if is_mmproj(path) else 'a capsule'}, not a model: give the model file, this one is found beside it")
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise KVCapsuleError(f"{path} is not a GGUF file")
    return path


def demo_folder() -> Path:
    """The bundled demo model, or $KVCAPSULE_DEMO."""
    return Path(os.environ.get("KVCAPSULE_DEMO") or Path(__file__).resolve().parents[1] / "demo")


def model_in(folder: Path) -> Path:
    """The first model of a folder, projectors and capsules left out. Raises KVCapsuleError."""
    for path in _ggufs(folder):
        if not (is_mmproj(path) or is_capsule(path)):
            return path
    raise KVCapsuleError(f"no model in {folder}")


def is_mmproj(path: Path) -> bool:
    """mmproj-model.gguf, and model.mmproj-f16.gguf as well."""
    return "mmproj" in path.name.lower()


def is_capsule(path: Path) -> bool:
    return path.name.lower().startswith("kvcapsule-")


def check_file(path: Path, what: str) -> Path:
    if not path.is_file():
        raise KVCapsuleError(f"{what} {path} {'is not a file' if path.exists() else 'does not exist'}")
    if not os.access(path, os.R_OK):
        raise KVCapsuleError(f"{what} {path} cannot be read (permission)")
    return path


def find_mmproj(model: Path, given: Path | None) -> Path | None:
    """--mmproj, or the projector beside the model that is most like it. Raises KVCapsuleError for a given file that is not there."""
    if given is not None:
        return check_file(given, "the projector")
    found = _beside(model, is_mmproj)
    if len(found) <= 1:
        return found[0] if found else None
    return max(found, key=lambda path: (_common(path, model), *_likeness(path.name, model.name)))


def find_capsule(setting: str, model: Path, mmproj: Path | None, architecture: str, fingerprint: str) -> Path | None:
    """The capsule file (or the mmproj that holds it), None if there is none or `setting` is off. Raises KVCapsuleError when the choice is not clear.

    A file that is damaged is still chosen when nothing else fits: loading it tells the user, ignoring it would silently run uncompressed."""
    if setting == "off":
        return None
    if setting != AUTO:
        return check_file(Path(setting), "the capsule")
    if mmproj is not None and (inside := read_info(mmproj)) is not None and inside.fits(architecture, fingerprint):
        return mmproj
    infos = [read_info(path) or CapsuleInfo(path, damaged=True) for path in _beside(model, is_capsule)]
    fitting = [info.path for info in infos if not info.damaged and info.fits(architecture, fingerprint)]
    if len(fitting) > 1:
        raise KVCapsuleError(f"several capsules fit this model ({', '.join(path.name for path in fitting)}): choose one with --capsule")
    damaged = [info.path for info in infos if info.damaged]
    return fitting[0] if fitting else damaged[0] if damaged else None


def read_info(path: Path) -> CapsuleInfo | None:
    """What the capsule in `path` is for; None if there is none in it. Never raises: a file that cannot be read comes back as damaged."""
    keys = ("kvcapsule.version", "kvcapsule.base.architecture", "kvcapsule.base.fingerprint")
    try:
        values = read_header(path, keys.__contains__).values
    except (GGUFError, OSError):
        return CapsuleInfo(path, damaged=True)
    if keys[0] not in values:
        return None
    architecture, fingerprint = (value.data if (value := values.get(key)) and value.type == "str" and not value.array else "" for key in keys[1:])
    version = values[keys[0]].data
    return CapsuleInfo(path, architecture, fingerprint, version if isinstance(version, int) else 0)


def _ggufs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")


def _beside(model: Path, kind: Callable[[Path], bool]) -> list[Path]:
    """Files of a kind beside the model; where there are none and the model is a link, beside the file that it leads to."""
    return [p for p in _ggufs(model.parent) if kind(p)] or [p for p in _ggufs(model.resolve().parent) if kind(p)]


def _common(a: Path, b: Path) -> int:
    """Length of the name that both share, without the sidecar's prefix."""

    def plain(path: Path) -> str:
        return re.sub(r"[^a-z0-9]", "", re.sub(r"mmproj-?", "", path.stem.lower()))

    return len(os.path.commonprefix([plain(a), plain(b)]))
