"""Model and projector, loaded once; pictures encoded once for all contexts."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import native
from ..chat.files import BUILT_IN
from ..chat.log import Log
from ..format.projector import check_projector, has_m_rope
from ..native.shapes import metadata
from ..runtime import interrupts
from ..runtime.errors import KVCapsuleError
from ..runtime.marker import MARKER
from ..runtime.pictures import new_bitmap

FLOATS = c.POINTER(c.c_float)


class EvalError(KVCapsuleError):
    """The text is one clear line for the user."""


class Vlm:
    """The loaded model. Everything it hands out dies with it."""

    def __init__(self, model: Path, mmproj: Path, threads: int, verbose: bool = False, device: str = "auto") -> None:
        """device: "cpu", or whatever the library was built for. Raises EvalError."""
        for name in ("LLAMA_KVCAPSULE", "LLAMA_KVCAPSULE_HOT"):
            os.environ.pop(name, None)
        self.threads, self.device = threads, device
        self.native = native.load()
        self.llama, self.mtmd = self.native.llama, self.native.mtmd
        self.path, self.mmproj = model, mmproj
        self._capsules: dict[Path, native.Capsule] = {}
        if not verbose:
            Log(self.native, False, True)
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()

    def _open(self, stack: ExitStack) -> None:
        self.llama.llama_backend_init()
        options = self.llama.llama_model_default_params()
        if self.device == "cpu":
            options.n_gpu_layers = 0
        self.model = self.llama.llama_model_load_from_file(os.fsencode(self.path), interrupts.stoppable(options))
        if not self.model:
            raise EvalError(f"{self.path} cannot be loaded as a model")
        stack.callback(self.llama.llama_model_free, self.model)
        self.many_positions = has_m_rope(self.llama, self.model)  # of one token
        check_projector(self.mmproj, self.many_positions)
        params = self.mtmd.mtmd_context_params_default()
        params.print_timings = params.warmup = False
        params.n_threads = self.threads
        params.use_gpu = self.device != "cpu"
        params.media_marker = MARKER.encode()
        self.projector = self.mtmd.mtmd_init_from_file(os.fsencode(self.mmproj), self.model, interrupts.stoppable(params))
        if not self.projector:
            raise EvalError(f"{self.mmproj} cannot be used as a vision projector of {self.path.name}")
        stack.callback(self.mtmd.mtmd_free, self.projector)
        if not self.mtmd.mtmd_support_vision(self.projector):
            raise EvalError(f"{self.mmproj} is not a vision projector")
        self.vocab = self.llama.llama_model_get_vocab(self.model)
        self.n_vocab = self.llama.llama_vocab_n_tokens(self.vocab)
        self.n_embd = self.llama.llama_model_n_embd_inp(self.model)
        self.bos, self.eos = self.llama.llama_vocab_bos(self.vocab), self.llama.llama_vocab_eos(self.vocab)

    def close(self) -> None:
        for capsule in self._capsules.values():
            capsule.close()
        self._stack.close()

    def capsule(self, path: Path) -> native.Capsule:
        if path not in self._capsules:
            self._capsules[path] = native.Capsule.builtin(self.model) if str(path) == BUILT_IN else native.Capsule.load(self.model, path)
        return self._capsules[path]

    def metadata(self, key: str) -> str | None:
        return metadata(self.model, key)

    def piece(self, token: int) -> str:
        if token < 0:
            return ""
        buffer = c.create_string_buffer(256)
        n = self.llama.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[:max(n, 0)].decode(errors="replace")

    def tokenize(self, text: str) -> list[int]:
        """Of a text that follows a picture."""
        data = text.encode()
        out = (self.llama.llama_token * (4 * len(data) + 16))()  # SentencePiece may write a space as three bytes
        n = self.llama.llama_tokenize(self.vocab, data, len(data), out, len(out), False, True)
        if n < 0:
            raise EvalError("the tokenizer failed")
        return list(out[:n])

    def ends(self, token: int) -> bool:
        return bool(self.llama.llama_vocab_is_eog(self.vocab, token))

    def read(self, before: str, *pictures: Image.Image) -> Picture:
        """Encodes pictures, one after the other behind the text, once for all contexts."""
        with self._chunks(before, pictures) as chunks:
            return self._encode(chunks)

    def shape(self, picture: Image.Image) -> tuple[int, int]:
        """(tokens, width in tokens or 0) of a picture, or of the largest of its slices, without encoding it."""
        with self._chunks("", (picture,)) as chunks:
            found = [self.mtmd.mtmd_input_chunks_get(chunks, i) for i in range(self.mtmd.mtmd_input_chunks_size(chunks))]
            sizes = [self._size(chunk) for chunk in found if not self._is_text(chunk)]
        return max(sizes, key=lambda size: size[0], default=(0, 0))

    @contextmanager
    def _chunks(self, before: str, pictures: tuple[Image.Image, ...]) -> Iterator[int]:
        made = [new_bitmap(self.mtmd, np.asarray(picture.convert("RGB"))) for picture in pictures]
        chunks = self.mtmd.mtmd_input_chunks_init()
        try:
            text = (before + MARKER * len(made)).encode()
            asked = self.mtmd.mtmd_input_text(text, len(text), True, True)
            bitmaps = (c.c_void_p * len(made))(*made)
            if self.mtmd.mtmd_tokenize(self.projector, chunks, c.byref(asked), bitmaps, len(made)) != 0:
                sizes = ", ".join(f"{p.width} x {p.height}" for p in pictures)
                raise EvalError(f"pictures of {sizes} pixels cannot be prepared for the model")
            yield chunks
        finally:
            self.mtmd.mtmd_input_chunks_free(chunks)
            for bitmap in made:
                self.mtmd.mtmd_bitmap_free(bitmap)

    def _encode(self, chunks: int) -> Picture:
        parts: list[list[int] | Encoded] = []
        for i in range(self.mtmd.mtmd_input_chunks_size(chunks)):
            chunk = self.mtmd.mtmd_input_chunks_get(chunks, i)
            if self._is_text(chunk):
                count = c.c_size_t()
                tokens = self.mtmd.mtmd_input_chunk_get_tokens_text(chunk, c.byref(count))
                parts.append(list(tokens[:count.value]))
            else:
                if self.mtmd.mtmd_encode_chunk(self.projector, chunk) != 0:
                    raise EvalError("the picture cannot be encoded")
                n, width = self._size(chunk)
                found = c.cast(self.mtmd.mtmd_get_output_embd(self.projector), FLOATS)
                embd = np.array(np.ctypeslib.as_array(found, (n, self.n_embd)))
                parts.append(Encoded(self.mtmd, self.mtmd.mtmd_input_chunk_copy(chunk), embd, width))
        if not any(isinstance(part, Encoded) for part in parts):
            raise EvalError("the projector made no tokens of a picture")
        return Picture(parts)

    def _is_text(self, chunk: int) -> bool:
        return self.mtmd.mtmd_input_chunk_get_type(chunk) == self.mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT

    def _size(self, chunk: int) -> tuple[int, int]:
        """(tokens, width of their grid or 0). Without M-RoPE libmtmd's width may be the number of all tokens; with it, that is a grid of one row."""
        n = self.mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        width = self.mtmd.mtmd_image_tokens_get_nx(self.mtmd.mtmd_input_chunk_get_tokens_image(chunk))
        if width and n % width == 0 and (n > width or self.many_positions):
            return n, width
        side = int(n**0.5 + 0.5)
        return n, side if side * side == n else 0


@dataclass
class Encoded:
    """The vision tokens of a picture."""

    mtmd: Any
    chunk: int
    embd: np.ndarray
    width: int  # of the grid in tokens, 0 = unknown

    def free(self) -> None:
        self.mtmd.mtmd_input_chunk_free(self.chunk)


@dataclass
class Picture:
    """Pictures and the text before (and, for some models, around) them."""

    parts: list[list[int] | Encoded]

    @property
    def n_vision(self) -> int:
        return sum(len(p.embd) for p in self.parts if isinstance(p, Encoded))

    def free(self) -> None:
        for part in self.parts:
            if isinstance(part, Encoded):
                part.free()
