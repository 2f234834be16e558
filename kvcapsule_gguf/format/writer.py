"""A GGUF file that appears whole or not at all, and takes no place but that of a capsule."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gguf

from .capsule import CapsuleFileError
from .gguf_header import GGUFError, read_header


def check_place(path: Path) -> None:
    """A capsule takes the place of another one, but not of a model, a projector or anything else. Raises CapsuleError."""
    if not os.path.lexists(path):
        return
    try:
        kind = read_header(path, "adapter.type".__eq__).values.get("adapter.type") if path.is_file() else None
    except (GGUFError, OSError):
        kind = None
    if kind is None or kind.data != "kvcapsule":
        raise CapsuleFileError(path, "is there already and is no capsule: choose another name, or remove it first")


@contextmanager
def whole_file(path: Path, architecture: str, error: type[CapsuleFileError] = CapsuleFileError) -> Iterator[gguf.GGUFWriter]:
    """A writer to fill; afterwards the file takes its name, or nothing of it is left where it could not be written. Raises `error`."""
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, architecture)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as e:
        part.unlink(missing_ok=True)
        raise error(path, f"can not be written: {e.strerror or 'the disk is full'}") from None  # numpy gives no reason
    finally:
        with suppress(OSError):  # what is left in a buffer of a full disk
            writer.close()
    os.replace(part, path)


def add_general(w: gguf.GGUFWriter, name: str, provenance: Mapping[str, Any]) -> None:
    """What any program says of a file. A capsule comes out of its model, so it has the licence of the model."""
    w.add_type("adapter")
    w.add_string("adapter.type", "kvcapsule")
    if name:
        w.add_name(name)
    licence = str(provenance.get("license", ""))
    if licence and licence.isascii() and licence.isprintable():
        w.add_license(licence)
