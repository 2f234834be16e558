"""A prompt as the chunks that the cache takes: runs of text tokens, and pictures."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..reuse.parts import ImagePart, Item
from ..runtime.digest import bytes_digest
from ..runtime.errors import KVCapsuleError
from ..runtime.pictures import Picture, new_bitmap
from .engine import Engine


@dataclass(frozen=True)
class Chunk:
    """tokens: text, else None; handle: of a picture (or of a slice of one), with its identity and the index of its picture; n_tokens are cells, not
    positions."""

    n_tokens: int
    tokens: list[int] | None = None
    handle: int | None = None
    picture: int = -1
    image: ImagePart | None = None

    @property
    def items(self) -> list[Item]:
        if self.tokens is not None:
            return list(self.tokens)
        assert self.image is not None
        return [self.image]


@contextmanager
def chunks(engine: Engine, text: str, pictures: list[Picture], first: bool) -> Iterator[list[Chunk]]:
    """Tokenizes `text`, in which a marker stands for each picture; first: it starts the sequence. The chunks live inside the with block."""
    if engine.mtmd_ctx is None:
        tokens = _tokenize(engine, text, first)
        yield [Chunk(len(tokens), tokens=tokens)]
        return
    mtmd = engine.native.mtmd
    handles: list[int] = []
    found = mtmd.mtmd_input_chunks_init()
    try:
        for index, picture in enumerate(pictures):
            handles.append(new_bitmap(mtmd, picture.rgb))
            # the slices of a large picture come back as several chunks with this name
            mtmd.mtmd_bitmap_set_id(handles[-1], str(index).encode())
        data = text.encode("utf-8", "replace")
        request = mtmd.mtmd_input_text(text=data, text_len=len(data), add_special=first, parse_special=True)
        bitmaps = (ctypes.c_void_p * len(handles))(*handles)
        status = mtmd.mtmd_tokenize(engine.mtmd_ctx, found, ctypes.byref(request), bitmaps, len(handles))
        if status != 0:
            names = ", ".join(picture.name for picture in pictures)
            raise KVCapsuleError(f"{names or 'the prompt'} cannot be prepared for the model: {engine.log.take() or f'status {status}'}")
        count = mtmd.mtmd_input_chunks_size(found)
        yield read_chunks(mtmd, [mtmd.mtmd_input_chunks_get(found, i) for i in range(count)], [picture.digest for picture in pictures])
    finally:
        mtmd.mtmd_input_chunks_free(found)
        for handle in handles:
            mtmd.mtmd_bitmap_free(handle)


def read_chunks(mtmd, handles: list[int], digests: list[str]) -> list[Chunk]:
    """mtmd's chunks; the bitmap of digests[i] has the id str(i). Raises KVCapsuleError for what is neither text nor a picture."""
    found: list[Chunk] = []
    for handle in handles:
        kind = mtmd.mtmd_input_chunk_get_type(handle)
        n_tokens = mtmd.mtmd_input_chunk_get_n_tokens(handle)
        if kind == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
            n = ctypes.c_size_t()
            tokens = mtmd.mtmd_input_chunk_get_tokens_text(handle, ctypes.byref(n))
            found.append(Chunk(n.value, tokens=list(tokens[: n.value])))
        elif kind == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            picture = int(mtmd.mtmd_input_chunk_get_id(handle) or b"0")
            piece = sum(chunk.picture == picture for chunk in found)
            digest = bytes_digest(digests[picture].encode(), b"%d" % piece)
            image = ImagePart(digest, mtmd.mtmd_input_chunk_get_n_pos(handle), n_tokens)
            found.append(Chunk(n_tokens, handle=handle, picture=picture, image=image))
        else:
            raise KVCapsuleError("only text and pictures can be in a prompt")
    return found


def _tokenize(engine: Engine, text: str, first: bool) -> list[int]:
    data = text.encode("utf-8", "replace")
    room = len(data) + 8
    buffer = (engine.llama.llama_token * room)()
    n = engine.llama.llama_tokenize(engine.vocab, data, len(data), buffer, room, first, True)
    if n < 0:
        raise KVCapsuleError("the prompt cannot be tokenized")
    return list(buffer[:n])
