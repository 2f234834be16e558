"""Keys, values and text queries of a real model: it looks at pictures through libmtmd and answers questions about them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from .. import native
from ..format.base_model import read_base_model
from .source import KVSample, TrainError
from .tap import TensorTap

QUESTIONS = (
    "What is in the image?",
    "Read the text in the image.",
    "How many objects are there, and what colours are they?",
    "Where is the largest object? Is anything to the left of it?",
    "Describe the picture in detail.",
)
SEQ = 0


class LlamaSource:
    """Iterates over KVSample, one for every picture. Raises TrainError; close it, or use it as a context manager."""

    def __init__(self, model: Path, mmproj: Path, images: Iterable[Image.Image], *, n_ctx: int = 8192, n_batch: int = 2048, threads: int = 0) -> None:
        self.images = images
        self.model = read_base_model(model)
        self.native = native.load()
        self.native.require_capsule()
        self.llama, self.mtmd = self.native.llama, self.native.mtmd
        self.tap = TensorTap(self.native, r"Qcur-\d+")
        self._stack = ExitStack()
        try:
            self._open(model, mmproj, n_ctx, n_batch, threads)
        except BaseException:
            self.close()
            raise

    def _open(self, model: Path, mmproj: Path, n_ctx: int, n_batch: int, threads: int) -> None:
        llama, mtmd, stack = self.llama, self.mtmd, self._stack
        silent = llama.llama_log_callback(lambda level, text, user: None)
        self._silent = silent  # the library keeps the pointer
        llama.llama_log_set(silent, ctypes.c_void_p(0))
        mtmd.mtmd_log_set(silent, ctypes.c_void_p(0))
        mtmd.mtmd_helper_log_set(silent, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self.handle = llama.llama_model_load_from_file(os.fsencode(model), llama.llama_model_default_params())
        if not self.handle:
            raise TrainError(f"{model} can not be loaded as a model")
        stack.callback(llama.llama_model_free, self.handle)
        threads = threads or min(4, os.cpu_count() or 1)
        media = mtmd.mtmd_context_params_default()
        media.print_timings, media.warmup, media.n_threads = False, False, threads
        self.media = mtmd.mtmd_init_from_file(os.fsencode(mmproj), self.handle, media)
        if not self.media:
            raise TrainError(f"{mmproj} can not be used as a vision projector of {model}")
        stack.callback(mtmd.mtmd_free, self.media)
        if not mtmd.mtmd_support_vision(self.media):
            raise TrainError(f"{mmproj} is not a vision projector")
        params = llama.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = n_batch  # some models need an image in one batch
        params.n_threads = params.n_threads_batch = threads
        params.cb_eval = self.tap.callback
        params.no_perf = True
        self.ctx = llama.llama_init_from_model(self.handle, params)
        if not self.ctx:
            raise TrainError(f"a context of {n_ctx} tokens can not be created for {model}")
        stack.callback(llama.llama_free, self.ctx)
        self.n_batch = n_batch
        self.prompt = self._template()

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> LlamaSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[KVSample]:
        for image in self.images:
            yield self._sample(image)

    def _template(self) -> str:
        """A user's turn with a marker for the picture and "\\0" for the question."""
        marker = self.mtmd.mtmd_default_marker().decode()
        content = (marker + "\n\0").encode()
        message = self.llama.llama_chat_message(role=b"user", content=content.replace(b"\0", b"QUESTION"))
        source = self.llama.llama_model_chat_template(self.handle, None)
        buffer = ctypes.create_string_buffer(65536)
        n = self.llama.llama_chat_apply_template(source, ctypes.byref(message), 1, True, buffer, len(buffer)) if source else -1
        # a template that llama.cpp does not know: the queries hardly depend on it
        text = buffer.raw[:n].decode("utf-8", "replace") if 0 < n < len(buffer) else f"USER: {marker}\nQUESTION\nASSISTANT:"
        return text if marker in text and "QUESTION" in text else f"USER: {marker}\nQUESTION\nASSISTANT:"

    def _sample(self, image: Image.Image) -> KVSample:
        llama, mtmd = self.llama, self.mtmd
        memory = llama.llama_get_memory(self.ctx)
        llama.llama_memory_clear(memory, True)
        rgb = image.convert("RGB")
        raw = rgb.tobytes()
        bitmap = mtmd.mtmd_bitmap_init(rgb.width, rgb.height, (ctypes.c_uint8 * len(raw)).from_buffer_copy(raw))
        chunks = mtmd.mtmd_input_chunks_init()
        before, after = self.prompt.split(mtmd.mtmd_default_marker().decode(), 1)
        try:
            text = (before + mtmd.mtmd_default_marker().decode()).encode()
            request = mtmd.mtmd_input_text(text=text, text_len=len(text), add_special=True, parse_special=True)
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            if mtmd.mtmd_tokenize(self.media, chunks, ctypes.byref(request), bitmaps, 1) != 0:
                raise TrainError(f"a picture of {rgb.width} x {rgb.height} pixels can not be prepared for the model")
            spans, past = self._eval(chunks)
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)
        # an image in several slices: each slice is a span of its own; the largest stands for them
        p0, p1, n, width = max(spans, key=lambda s: s[2])
        keys, values = [], []
        for layer in self.model.kv_layers:
            shape = (self.model.head_count_kv[layer], self.model.key_length[layer], self.model.value_length[layer])
            try:
                k, v = native.read_kv(self.ctx, layer, shape, seq=SEQ, p0=p0, p1=p1, n_max=n)
            except native.CapsuleError as error:
                raise TrainError(str(error)) from None
            keys.append(k)
            values.append(v)
        return KVSample(keys, values, self._queries(after, past), width, p0)

    def _eval(self, chunks: int) -> tuple[list[tuple[int, int, int, int]], int]:
        """Decodes all chunks -> ([(first position, end, tokens, width in tokens) of every image span], next position)."""
        mtmd = self.mtmd
        past, spans = 0, []
        for i in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, i)
            end = self.llama.llama_pos(past)
            if mtmd.mtmd_helper_eval_chunk_single(self.media, self.ctx, chunk, past, SEQ, self.n_batch, False, ctypes.byref(end)) != 0:
                raise TrainError("a picture does not fit into the context")
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                tokens = mtmd.mtmd_input_chunk_get_tokens_image(chunk)
                n, width = mtmd.mtmd_input_chunk_get_n_tokens(chunk), mtmd.mtmd_image_tokens_get_nx(tokens)
                spans.append((past, end.value, n, width if width and n % width == 0 and n > width else _side(n)))
            past = end.value
        if not spans:
            raise TrainError("the projector made no tokens of a picture")
        return spans, past

    def _queries(self, after: str, past: int) -> list[np.ndarray]:
        """Asks all questions after the picture, one after the other, each time from the same state."""
        memory = self.llama.llama_get_memory(self.ctx)
        vocab = self.llama.llama_model_get_vocab(self.handle)
        found: list[list[np.ndarray]] = [[] for _ in self.model.kv_layers]
        for question in QUESTIONS:
            raw = after.replace("QUESTION", question).encode()
            tokens = (self.llama.llama_token * (len(raw) + 8))()
            n = self.llama.llama_tokenize(vocab, raw, len(raw), tokens, len(tokens), False, True)
            self.tap.on = True
            status = self.llama.llama_decode(self.ctx, self.llama.llama_batch_get_one(tokens, n))
            self.tap.on = False
            if status != 0:
                raise TrainError("a question does not fit into the context behind the picture")
            seen = self.tap.take()
            for i, layer in enumerate(self.model.kv_layers):
                q = seen.get(f"Qcur-{layer}")
                if q is not None:
                    heads, d = self.model.head_count[layer], self.model.key_length[layer]
                    found[i].append(q.reshape(-1, heads, d))
            self.llama.llama_memory_seq_rm(memory, SEQ, past, -1)
        empty = [(self.model.head_count[x], self.model.key_length[x]) for x in self.model.kv_layers]
        # the last layer computes queries only for tokens whose logits are wanted
        return [np.concatenate(q) if q else np.zeros((0, *shape), np.float32) for q, shape in zip(found, empty)]


def _side(n: int) -> int:
    """Width of a square grid of n tokens, 0 if it is not one."""
    side = int(n**0.5 + 0.5)
    return side if side * side == n else 0
