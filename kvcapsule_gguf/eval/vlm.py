"""Model and projector, loaded once, and one context for each setting."""

from __future__ import annotations

import ctypes as c
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .. import native
from ..native.shapes import metadata
from .settings import BITS, TYPES, Setting, dropped

MARKER = "<__media__>"
FLOATS = c.POINTER(c.c_float)


class EvalError(RuntimeError):
    """The text is one clear line for the user."""


class Vlm:
    """The loaded model. Everything it hands out dies with it."""

    def __init__(self, model: Path, mmproj: Path, threads: int, verbose: bool = False) -> None:
        for name in ("LLAMA_KVCAPSULE", "LLAMA_KVCAPSULE_HOT"):
            os.environ.pop(name, None)
        self.threads = threads
        self.native = native.load()
        self.llama, self.mtmd = self.native.llama, self.native.mtmd
        self.path, self.mmproj = model, mmproj
        self._capsules: dict[Path, native.Capsule] = {}
        # ctypes callbacks must outlive the library's use of them
        self._log = self.llama.llama_log_callback(lambda level, text, user: None)
        if not verbose:
            nothing = c.c_void_p(0)
            self.llama.llama_log_set(self._log, nothing)
            self.mtmd.mtmd_log_set(self._log, nothing)
            self.mtmd.mtmd_helper_log_set(self._log, nothing)
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()

    def _open(self, stack: ExitStack) -> None:
        self.llama.llama_backend_init()
        self.model = self.llama.llama_model_load_from_file(os.fsencode(self.path), self.llama.llama_model_default_params())
        if not self.model:
            raise EvalError(f"{self.path} cannot be loaded")
        stack.callback(self.llama.llama_model_free, self.model)
        params = self.mtmd.mtmd_context_params_default()
        params.print_timings = params.warmup = False
        params.n_threads = self.threads
        self.projector = self.mtmd.mtmd_init_from_file(os.fsencode(self.mmproj), self.model, params)
        if not self.projector:
            raise EvalError(f"{self.mmproj} cannot be used with {self.path.name}")
        stack.callback(self.mtmd.mtmd_free, self.projector)
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
            self._capsules[path] = native.Capsule.load(self.model, path)
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

    def read(self, before: str, picture: Image.Image) -> Picture:
        """Encodes a picture once, for all contexts."""
        rgb = picture.convert("RGB")
        pixels = (c.c_uint8 * (rgb.width * rgb.height * 3)).from_buffer_copy(rgb.tobytes())
        bitmap = self.mtmd.mtmd_bitmap_init(rgb.width, rgb.height, pixels)
        chunks = self.mtmd.mtmd_input_chunks_init()
        try:
            text = (before + MARKER).encode()
            asked = self.mtmd.mtmd_input_text(text, len(text), True, True)
            bitmaps = (self.mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            if self.mtmd.mtmd_tokenize(self.projector, chunks, c.byref(asked), bitmaps, 1) != 0:
                raise EvalError("the picture cannot be prepared")
            return self._encode(chunks)
        finally:
            self.mtmd.mtmd_input_chunks_free(chunks)
            self.mtmd.mtmd_bitmap_free(bitmap)

    def _encode(self, chunks: int) -> Picture:
        parts: list[list[int] | Encoded] = []
        for i in range(self.mtmd.mtmd_input_chunks_size(chunks)):
            chunk = self.mtmd.mtmd_input_chunks_get(chunks, i)
            n = self.mtmd.mtmd_input_chunk_get_n_tokens(chunk)
            if self.mtmd.mtmd_input_chunk_get_type(chunk) == self.mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = c.c_size_t()
                tokens = self.mtmd.mtmd_input_chunk_get_tokens_text(chunk, c.byref(count))
                parts.append(list(tokens[:count.value]))
            else:
                if self.mtmd.mtmd_encode_chunk(self.projector, chunk) != 0:
                    raise EvalError("the picture cannot be encoded")
                found = c.cast(self.mtmd.mtmd_get_output_embd(self.projector), FLOATS)
                embd = np.array(np.ctypeslib.as_array(found, (n, self.n_embd)))
                parts.append(Encoded(self.mtmd, self.mtmd.mtmd_input_chunk_copy(chunk), embd))
        return Picture(parts)


@dataclass
class Encoded:
    """The vision tokens of a picture."""

    mtmd: object
    chunk: int
    embd: np.ndarray

    def free(self) -> None:
        self.mtmd.mtmd_input_chunk_free(self.chunk)


@dataclass
class Picture:
    """A picture and the text before (and, for some models, around) it."""

    parts: list[list[int] | Encoded]

    @property
    def n_vision(self) -> int:
        return sum(len(p.embd) for p in self.parts if isinstance(p, Encoded))

    def free(self) -> None:
        for part in self.parts:
            if isinstance(part, Encoded):
                part.free()


@dataclass(frozen=True)
class CacheUse:
    """Of the vision tokens of one picture."""

    bytes_f16: int
    bytes_now: int
    n_slots: tuple[int, int]  # economy, faithful


class Cache:
    """One context: holds a picture, then answers about it."""

    def __init__(self, vlm: Vlm, setting: Setting, n_ctx: int, n_questions: int, flash_attn: bool = True) -> None:
        self.vlm, self.setting = vlm, setting
        self.llama = vlm.llama
        p = self.llama.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch = n_ctx, min(n_ctx, 2048), 512
        p.n_seq_max, p.kv_unified = n_questions + 1, True
        p.n_threads = p.n_threads_batch = vlm.threads
        p.flash_attn_type = 1 if flash_attn else 0
        p.type_k = p.type_v = TYPES[setting.cache]
        self.n_batch = p.n_batch
        if setting.capsule:
            native.next_context(vlm.capsule(setting.capsule), n_hot=n_ctx, ratio=setting.ratio, auto_compress=False, guard=setting.guard)
        self.ctx = self.llama.llama_init_from_model(vlm.model, p)
        if not self.ctx:
            reason = native.last_error() if setting.capsule else "see the log (-v)"
            raise EvalError(f"{setting.name}: the context cannot be created: {reason}")
        self.memory = self.llama.llama_get_memory(self.ctx)
        self.n_past = 0

    def close(self) -> None:
        self.llama.llama_free(self.ctx)

    def show(self, picture: Picture) -> CacheUse:
        """Forgets everything, decodes a picture and compresses it; says what that takes."""
        self.llama.llama_memory_clear(self.memory, True)
        self.n_past = 0
        spans = []
        for part in picture.parts:
            if isinstance(part, Encoded):
                start = self.n_past
                past = self.llama.llama_pos(0)
                none = self.vlm.mtmd.mtmd_helper_post_decode_callback(0)
                rc = self.vlm.mtmd.mtmd_helper_decode_image_chunk(
                    self.vlm.projector, self.ctx, part.chunk, part.embd.ctypes.data_as(FLOATS), self.n_past, 0, self.n_batch,
                    c.byref(past), none, None)
                if rc != 0:
                    raise EvalError(f"{self.setting.name}: the picture cannot be decoded ({rc})")
                self.n_past = past.value
                spans.append((start, self.n_past, len(part.embd)))
            else:
                self._decode([(t, self.n_past + i, 0, False) for i, t in enumerate(part)])
                self.n_past += len(part)
        return self._shrink(spans)

    def _shrink(self, spans: list[tuple[int, int, int]]) -> CacheUse:
        shapes = native.layer_shapes(self.vlm.model)
        per_token = sum(n * (d_k + d_v) for n, d_k, d_v in shapes)
        n = sum(count for *_, count in spans)
        f16 = 2 * per_token * n
        if self.setting.capsule:
            for p0, p1, _ in spans:
                native.compress(self.ctx, 0, p0, p1)
            s = native.stats(self.ctx)
            return CacheUse(s.kv_bytes_f16, s.kv_bytes, s.n_slots)
        kept = n
        if self.setting.drop:
            for p0, p1, count in spans:
                if p1 - p0 != count:
                    raise EvalError("dropping tokens by position needs a model with one position for each vision token")
                for a, b in dropped(count, self.setting.drop):
                    self.llama.llama_memory_seq_rm(self.memory, 0, p0 + a, p0 + b)
                    kept -= b - a
        return CacheUse(f16, int(per_token * kept * BITS[self.setting.cache] / 8), (0, 0))

    def ask(self, questions: list[tuple[list[int], int]]) -> list[np.ndarray]:
        """(tokens after the picture, how many of them are the answer), each -> logits [n_answer, n_vocab] that predict the answer.

        Every question is a sequence of its own that shares the picture, all in as few batches as possible; they are forgotten afterwards."""
        out: list[np.ndarray | None] = [None] * len(questions)
        group: list[int] = []
        size = 0
        for i, (tokens, _) in enumerate(questions):
            if size + len(tokens) > self.n_batch:
                self._ask(questions, group, out)
                group, size = [], 0
            group.append(i)
            size += len(tokens)
        self._ask(questions, group, out)
        return [x for x in out if x is not None]

    def write(self, question: list[int], n_max: int) -> list[int]:
        """The greedy answer to a question, with the token that ends it if it comes within n_max."""
        written: list[int] = []
        self.llama.llama_memory_seq_cp(self.memory, 0, 1, -1, -1)
        rows = [(t, self.n_past + i, 1, i == len(question) - 1) for i, t in enumerate(question)]
        while len(written) < n_max and not (written and self.vlm.ends(written[-1])):
            written.append(int(self._decode(rows)[-1].argmax()))
            rows = [(written[-1], self.n_past + len(question) + len(written) - 1, 1, True)]
        self.llama.llama_memory_seq_rm(self.memory, 1, -1, -1)
        return written

    def _ask(self, questions: list[tuple[list[int], int]], group: list[int], out: list[np.ndarray | None]) -> None:
        rows = []
        for s, i in enumerate(group, 1):
            tokens, n_answer = questions[i]
            self.llama.llama_memory_seq_cp(self.memory, 0, s, -1, -1)
            first = len(tokens) - n_answer - 1
            rows += [(t, self.n_past + j, s, first <= j < len(tokens) - 1) for j, t in enumerate(tokens)]
        logits = self._decode(rows)
        at = 0
        for s, i in enumerate(group, 1):
            n = questions[i][1]
            out[i] = logits[at:at + n]
            at += n
            self.llama.llama_memory_seq_rm(self.memory, s, -1, -1)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> np.ndarray:
        """(token, position, sequence, wants logits) -> the logits asked for."""
        n = len(rows)
        batch = self.llama.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, (token, pos, seq, wanted) in enumerate(rows):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, pos, 1, wanted
                batch.seq_id[i][0] = seq
            rc = self.llama.llama_decode(self.ctx, batch)
            if rc != 0:
                raise EvalError(f"{self.setting.name}: llama_decode returned {rc}")
            wanted = sum(row[3] for row in rows)
            if not wanted:
                return np.empty((0, self.vlm.n_vocab), np.float32)
            found = c.cast(self.llama.llama_get_logits(self.ctx), FLOATS)
            return np.array(np.ctypeslib.as_array(found, (wanted, self.vlm.n_vocab)))
        finally:
            self.llama.llama_batch_free(batch)
