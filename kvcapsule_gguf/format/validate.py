"""One line for each rule that a file breaks."""

from __future__ import annotations

import numpy as np

from .gguf_header import Header


class Invalid(ValueError):
    """One line: key or tensor, and the reason."""


def need(ok: bool, reason: str) -> None:
    if not ok:
        raise Invalid(reason)


def read_tensor(header: Header, name: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of the tensor `name`, of this `shape` (numpy's order). Raises Invalid where it is missing, or of another type than `kind` or another shape."""
    info = header.tensors.get(name)
    if info is None:
        raise Invalid(f"tensor {name} is missing")
    need(info.type_name == kind, f"tensor {name} has type {info.type_name}, not {kind}")
    ne = shape[::-1] + (1,) * (4 - len(shape))
    need(info.ne4 == ne, f"tensor {name} has shape {list(info.ne4)}, not {list(ne)}")
    return header.read(info).reshape(shape)
