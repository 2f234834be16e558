"""from_pretrained(): which files of a repository belong together, and their download."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from ..chat import hub
from ..runtime.errors import KVCapsuleError


def fetch(repo_id: str, filename: str | None, additional: list[str], *, local_dir: str | Path | None, cache_dir: str | Path | None) -> tuple[Path, Path | None]:
    """(model, mmproj); capsules land beside the model. Raises KVCapsuleError."""
    where = {name: str(value) for name, value in (("local_dir", local_dir), ("cache_dir", cache_dir)) if value is not None}
    names, get = hub.repository(repo_id, repo_id, **where)
    choice = hub.choose(_narrowed(names, filename, repo_id) if filename else names, "", repo_id)
    for name in (*choice.capsules, *(name for pattern in additional for name in names if fnmatch(name, pattern))):
        get(name)
    paths = [get(name) for name in choice.model]
    return paths[0], get(choice.mmproj) if choice.mmproj else None


def _narrowed(names: list[str], pattern: str, repo_id: str) -> list[str]:
    """The models that `pattern` names, with all their parts, and the sidecars. Raises KVCapsuleError unless it names one."""
    models = [name for name in names if name.endswith(".gguf") and not hub.is_sidecar(name)]
    found = [name for name in models if fnmatch(name, pattern) or fnmatch(PurePosixPath(name).name, pattern)]
    stems = {hub.SHARD.sub("", name) for name in found}
    if len(stems) != 1:
        raise KVCapsuleError(f"{'Multiple files' if stems else 'No file'} found in {repo_id} that match {pattern} (there are: {', '.join(models) or 'no models'})")
    return [name for name in names if hub.is_sidecar(name) or hub.SHARD.sub("", name) in stems]
