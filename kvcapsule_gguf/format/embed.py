"""A capsule inside an mmproj GGUF: clip ignores keys and tensors that it does not know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf

from .capsule import CapsuleFileError
from .gguf_header import GGUFError, read_header
from .schema import INFIX
from .tile_capsule import TileCapsule, add_tile_capsule, read_tile_capsule
from .writer import whole_file

PREFIX = "kvcapsule."
NAME = "name"  # kvcapsule.train.name: a sidecar has its name in general.name


class MmprojError(CapsuleFileError):
    """Not a projector that can carry a capsule; one line."""

    what = "mmproj"


def embed(mmproj: Path, capsule: TileCapsule | None, out: Path) -> Path:
    """A copy of the projector with the capsule in it, in place of the one it may have; None: without one. Raises CapsuleError."""
    _check(mmproj)
    if out.exists() and out.samefile(mmproj):
        raise MmprojError(mmproj, "can not be written over: choose another --outfile")
    if out.exists():
        _check(out)  # only a projector is replaced
    reader = gguf.GGUFReader(mmproj)
    with whole_file(out, str(reader.fields["general.architecture"].contents()), MmprojError) as writer:
        _copy(reader, writer)
        if capsule is not None:
            named = replace(capsule, provenance={**capsule.provenance, NAME: capsule.name}) if capsule.name else capsule
            add_tile_capsule(writer, named)
    return out


def extract(mmproj: Path) -> TileCapsule:
    """The capsule inside. Raises CapsuleError."""
    _check(mmproj)
    capsule = read_tile_capsule(mmproj)
    capsule.name = str(capsule.provenance.pop(NAME, ""))
    return capsule


def _check(mmproj: Path) -> None:
    """The header is read strictly before gguf-py, which trusts it, sees the file."""
    try:
        header = read_header(mmproj, ("general.type", "general.architecture").__contains__)
    except (GGUFError, OSError) as error:
        raise MmprojError(mmproj, f"can not be read: {getattr(error, 'strerror', None) or error}") from None
    kind, arch = (header.values.get(key) for key in ("general.type", "general.architecture"))
    if not (arch and arch.data == "clip") and not (kind and kind.data == "mmproj"):
        raise MmprojError(mmproj, "not a vision projector")
    if any(info.offset + info.nbytes > header.size for info in header.tensors.values()):
        raise MmprojError(mmproj, "its tensors reach behind the end of the file, which is incomplete")


def _copy(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith(("GGUF.", PREFIX)):
            continue
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    if reader.alignment != gguf.GGUF_DEFAULT_ALIGNMENT:
        writer.data_alignment = reader.alignment
    for tensor in reader.tensors:
        if INFIX not in tensor.name:
            writer.add_tensor(tensor.name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
