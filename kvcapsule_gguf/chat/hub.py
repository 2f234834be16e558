"""-hf user/repo[:quant]: which files of a repository are model, projector and capsule, and their download."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..runtime.errors import KVCapsuleError

# llama.cpp's order when no quantization is asked for
PREFERRED = ("Q4_K_M", "Q8_0")
SIDECARS = ("mmproj", "kvcapsule-", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Choice:
    """Names in the repository. model holds all shards, the first one first; capsules are candidates."""

    model: list[str]
    mmproj: str | None
    capsules: list[str]


def fetch(spec: str, offline: bool = False, token: str | None = None) -> tuple[Path, Path | None]:
    """(model, mmproj) of what `spec` names: from the local cache if both are there, else downloaded. Capsules land beside the model, where
    files.find_capsule() looks. A folder works too. offline: nothing is asked for. Raises KVCapsuleError."""
    repo, _, quant = spec.partition(":") if not Path(spec).is_dir() else (spec, "", "")
    if not Path(repo).is_dir() and (cached := _cached(repo)) is not None:
        with suppress(KVCapsuleError):
            names, get = cached
            choice = choose(names, quant, f"-hf {spec}")
            # without a projector it may be that a download was interrupted
            if choice.mmproj or offline:
                return get(choice.model[0]), get(choice.mmproj) if choice.mmproj else None
    if offline and not Path(repo).is_dir():
        raise KVCapsuleError(f"-hf {spec}: not in the local cache, and --offline asks for nothing else")
    names, get = repository(repo, f"-hf {spec}", **({"token": token} if token else {}))
    choice = choose(names, quant, f"-hf {spec}")
    paths = [get(name) for name in choice.model]
    mmproj = get(choice.mmproj) if choice.mmproj else None
    for name in choice.capsules:
        get(name)
    return paths[0], mmproj


def choose(names: list[str], quant: str, spec: str) -> Choice:
    """Picks by name, as llama.cpp does. Raises KVCapsuleError when there is no such model."""
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    models = [name for name in ggufs if not is_sidecar(name)]
    shards = {name: match for name in models if (match := SHARD.search(name))}
    heads = [name for name in models if name not in shards or int(shards[name][1]) == 1]
    if not heads:
        raise KVCapsuleError(f"{spec}: no GGUF model in this repository")
    head = _by_quant(heads, quant, spec)
    model = [head]
    if head in shards:
        stem = head[: shards[head].start()]
        model = sorted(name for name, match in shards.items() if name[: match.start()] == stem)
        if len(model) != int(shards[head][2]):
            raise KVCapsuleError(f"{spec}: {len(model)} of {int(shards[head][2])} parts of {head} are there")
    mmprojs = [name for name in ggufs if "mmproj" in PurePosixPath(name).name.lower() and _above(name, head)]
    mmproj = max(mmprojs, key=lambda name: (len(PurePosixPath(name).parts), *_likeness(name, head)), default=None)
    capsules = [name for name in ggufs if PurePosixPath(name).name.startswith("kvcapsule-") and PurePosixPath(name).parent == PurePosixPath(head).parent]
    return Choice(model, mmproj, capsules)


def is_sidecar(name: str) -> bool:
    return any(mark in PurePosixPath(name).name.lower() for mark in SIDECARS)


def _by_quant(heads: list[str], quant: str, spec: str) -> str:
    for tag in [quant] if quant else PREFERRED:
        pattern = re.compile(rf"(^|[-._/]){re.escape(tag)}([-._]|$)", re.IGNORECASE)
        if found := [name for name in heads if pattern.search(name)]:
            return found[0]
    if quant:
        raise KVCapsuleError(f"{spec}: no model with quantization {quant} (there are: {', '.join(heads)})")
    return heads[0]


def _above(name: str, model: str) -> bool:
    """In the model's folder or in one above it."""
    parts = PurePosixPath(name).parent.parts
    return PurePosixPath(model).parent.parts[: len(parts)] == parts


def _likeness(name: str, model: str) -> tuple[int, int]:
    """Nearer in bits first; f16 before bf16 and f32, which not every backend runs."""
    return -abs(_bits(name) - _bits(model)), -len(PurePosixPath(name).name)


def _bits(name: str) -> int:
    match = re.search(r"(?:^|[-._])(?:i?q(\d)|b?f(\d+))", PurePosixPath(name).name.lower())
    return int(match[1] or match[2]) if match else 16


def repository(repo: str, spec: str, **where: Any) -> tuple[list[str], Callable[[str], Path]]:
    """Names of all files, and a function that fetches one; from the local cache when the Hub cannot be reached. A folder is a repository too.

    spec: what the user wrote, for messages; where: local_dir, cache_dir, token of huggingface_hub. Raises KVCapsuleError."""
    folder = Path(repo)
    if folder.is_dir():
        return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.gguf"))], lambda name: folder / name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise KVCapsuleError(f"{spec}: expected user/repo or user/repo:quant")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        names = huggingface_hub.list_repo_files(repo, **{name: value for name, value in where.items() if name == "token"})
        return names, lambda name: Path(huggingface_hub.hf_hub_download(repo, name, **where))
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise KVCapsuleError(f"{spec}: no such repository, or no access to it") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    if (cached := _cached(repo, **where)) is None:
        raise KVCapsuleError(f"{spec}: the Hub cannot be reached and nothing is cached ({reason})")
    return cached


def _cached(repo: str, **where: Any) -> tuple[list[str], Callable[[str], Path]] | None:
    """As repository(), of what earlier downloads have left."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        return None
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True, **where))
    except Exception:
        return None
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.gguf"))], lambda name: folder / name
