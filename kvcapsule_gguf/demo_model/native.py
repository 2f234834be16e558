"""The demo models through libllama and libmtmd (by way of llama_cpp): tokens, logits, greedy answers.

Importing this loads the libraries: those that are loaded already, or those that scripts/setup made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import native

native.load()  # before llama_cpp, which would look for libraries of its own

import llama_cpp  # noqa: E402
from llama_cpp import mtmd_cpp  # noqa: E402

MARKER = "<__media__>"
_silent = llama_cpp.llama_log_callback(lambda level, text, data: None)


class NativeModel:
    """One model, one context, one conversation at a time; the image's cells are kept between questions."""

    def __init__(self, model: Path, mmproj: Path, n_ctx: int = 2048, threads: int = 1):
        llama_cpp.llama_log_set(_silent, None)
        mtmd_cpp.mtmd_log_set(_silent, None)
        mtmd_cpp.mtmd_helper_log_set(_silent, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 1024, 1024
        params.n_threads = params.n_threads_batch = threads
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        media = mtmd_cpp.mtmd_context_params_default()
        media.use_gpu, media.n_threads, media.warmup, media.print_timings = False, threads, False, False
        self.media = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), self.model, media)
        if not self.ctx or not self.media:
            raise RuntimeError(f"cannot load {model} with {mmproj}")
        self.past = 0

    def close(self) -> None:
        """Free everything."""
        mtmd_cpp.mtmd_free(self.media)
        llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self.model)

    def tokenize(self, text: str, special: bool = True, bos: bool = False) -> list[int]:
        """Tokens of text as llama_tokenize gives them."""
        raw = text.encode()
        out = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), out, len(out), bos, special)
        return list(out[:count])

    def embed(self, image: np.ndarray, width: int) -> np.ndarray:
        """Vision tokens of an image uint8 [H, W, 3]: float32 [tokens, width]."""
        chunks = self._chunks(MARKER, [image], bos=False)
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, 0)
        if mtmd_cpp.mtmd_encode_chunk(self.media, chunk):
            raise RuntimeError("mtmd_encode_chunk failed")
        count = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
        out = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(self.media), (count, width)).copy()
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        return out

    def feed(self, text: str, images: Sequence[np.ndarray] = (), bos: bool = False) -> np.ndarray:
        """Decode text with markers after what was fed before; returns the last logits [vocab] (none after an image)."""
        chunks = self._chunks(text, images, bos)
        past = llama_cpp.llama_pos(0)
        if mtmd_cpp.mtmd_helper_eval_chunks(self.media, self.ctx, chunks, self.past, 0, 1024, True, ctypes.byref(past)):
            raise RuntimeError("mtmd_helper_eval_chunks failed")
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        self.past = past.value
        return self._logits()

    def answer(self, logits: np.ndarray, limit: int = 80) -> str:
        """Greedy answer from the logits of the last fed token on."""
        out: list[int] = []
        while len(out) < limit:
            token = int(logits.argmax())
            if llama_cpp.llama_vocab_is_eog(self.vocab, token):
                break
            out.append(token)
            one = (llama_cpp.llama_token * 1)(token)
            if llama_cpp.llama_decode(self.ctx, llama_cpp.llama_batch_get_one(one, 1)):
                raise RuntimeError("llama_decode failed")
            self.past += 1
            logits = self._logits()
        return b"".join(map(self._piece, out)).decode(errors="replace").strip()

    def rewind(self, past: int = 0) -> None:
        """Forget everything from position `past` on."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.ctx), 0, past, -1)
        self.past = past

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        size = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, 64, 0, False)
        return buffer.raw[:size]

    def _logits(self) -> np.ndarray:
        size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        pointer = llama_cpp.llama_get_logits_ith(self.ctx, -1)
        return np.ctypeslib.as_array(pointer, (size,)).copy() if pointer else np.empty(0, np.float32)

    def _chunks(self, text: str, images: Sequence[np.ndarray], bos: bool):
        bitmaps = []
        for image in images:
            raw = np.ascontiguousarray(image, np.uint8).tobytes()
            data = (ctypes.c_uint8 * len(raw)).from_buffer_copy(raw)
            bitmaps.append(mtmd_cpp.mtmd_bitmap_init(image.shape[1], image.shape[0], data))
        raw_text = text.encode()
        wanted = mtmd_cpp.mtmd_input_text(raw_text, len(raw_text), bos, True)
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        array = (ctypes.c_void_p * max(1, len(bitmaps)))(*bitmaps)
        failed = mtmd_cpp.mtmd_tokenize(self.media, chunks, ctypes.byref(wanted), array, len(bitmaps))
        for bitmap in bitmaps:
            mtmd_cpp.mtmd_bitmap_free(bitmap)
        if failed:
            raise RuntimeError("mtmd_tokenize failed")
        return chunks
