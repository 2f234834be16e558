"""The header of a capsule file, and the rules that any file of tensors keeps."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from .gguf_header import GGUFError, Header, padded, read_header
from .schema import INFIX, MAX_FILE, MAX_HEADER, MAX_KV
from .validate import Invalid, need


def has_capsule(path: str | Path) -> bool:
    """Whether the file is a capsule, or an mmproj with one inside; False for anything else, damaged or not."""
    return capsule_version(path) is not None


def capsule_version(path: str | Path) -> Any:
    """What the file says, or None if it says nothing: it is no capsule, or damaged."""
    try:
        value = read_header(path, lambda key: key == "kvcapsule.version").values.get("kvcapsule.version")
    except (GGUFError, OSError):
        return None
    return value and value.data


def read_keys(path: Path, keys: Mapping[str, tuple[str, bool]], version: int) -> tuple[Header, bool]:
    """The header of a capsule of this format version, and whether it is a sidecar; keys: name -> (type, is an array), the version first. Raises GGUFError, Invalid."""
    header = read_header(path, lambda key: key.startswith(("kvcapsule.", "general.", "adapter.")))
    sidecar = "adapter.type" in header.values
    if sidecar:
        need(header.size <= MAX_FILE, f"the file has {header.size} bytes, more than 1 GiB")
        need(header.n_kv <= MAX_KV, f"{header.n_kv} keys, more than {MAX_KV}")
        need(not header.skipped, f"unknown key {header.skipped}")
    need("kvcapsule.version" in header.values, "not a capsule: key kvcapsule.version is missing")
    need(header.end <= MAX_HEADER, "a header of more than 64 MiB")
    if sidecar:
        for key, wanted in (("general.type", "adapter"), ("adapter.type", "kvcapsule")):
            need(is_string(header, key) and header.values[key].data == wanted, f"not a capsule: key {key} is not '{wanted}'")
    for key, (kind, array) in keys.items():
        _check_type(header, key, kind, array)
        if key == "kvcapsule.version":
            found = header.values[key].data
            need(found != 1, "a capsule of format v1: train it anew with kvcapsule-train")
            need(found == version, f"kvcapsule.version: format version {found}, this program reads version {version}: update it")
    for key in sorted(header.values):
        known = key in keys or key.startswith("kvcapsule.train.") or not key.startswith("kvcapsule.")
        need(known, f"unknown key {key}")
    if sidecar:
        arch = _get(header, "kvcapsule.base.architecture")
        need(
            is_string(header, "general.architecture") and header.values["general.architecture"].data == arch,
            "general.architecture is not kvcapsule.base.architecture",
        )
    return header, sidecar


def is_string(header: Header, key: str) -> bool:
    value = header.values.get(key)
    return value is not None and (value.type, value.array) == ("str", False)


def _check_type(header: Header, key: str, kind: str, array: bool) -> None:
    value = header.values.get(key)
    if value is None:
        raise Invalid(f"key {key} is missing")
    wanted = f"an array of {kind}" if array else kind
    found = f"an array of {value.type}" if value.array else value.type
    need((value.type, value.array) == (kind, array), f"key {key} is {found}, not {wanted}")


def _get(header: Header, key: str) -> Any:
    return header.values[key].data


def array_of(header: Header, key: str, n: int) -> Any:
    """The elements of an array that has to have `n` of them. Raises Invalid."""
    data = _get(header, key)
    need(len(data) == n, f"key {key} has {len(data)} elements, not {n}")
    return data


def check_names(h: Header, expected: Container[str], sidecar: bool) -> None:
    """No other tensor is there; those of an mmproj are not looked at. Raises Invalid."""
    for name in h.tensors:
        need(name in expected or not (sidecar or INFIX in name), f"unexpected tensor {name}")


def check_cover(h: Header) -> None:
    """The bytes of a sidecar are all accounted for: nothing but zeros between and behind the tensors. Raises Invalid."""
    ends = [t.offset + t.nbytes for t in h.tensors.values()]
    last = max(ends, default=h.end)
    need(last <= h.size, "the tensors reach behind the end of the file, it is incomplete")
    need(h.size <= padded(last, h.alignment), f"{h.size - last} bytes behind the last tensor belong to nothing")
    for end in (h.end, *ends):
        need(not any(h.bytes(end, padded(end, h.alignment) - end)), "the padding of the file is not zeros")
