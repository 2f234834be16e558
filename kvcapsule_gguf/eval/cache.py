"""One context: a picture in the cache of a setting, and questions about it."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import native
from ..chat.args import CACHE_TYPES
from ..format.projector import fixed_tokens
from ..reuse.memory import restore, state
from ..runtime import interrupts
from . import vision_cells
from .settings import Setting, dropped
from .vlm import FLOATS, Encoded, EvalError, Picture, Vlm


@dataclass(frozen=True)
class CacheUse:
    """Of the vision tokens of one picture."""

    bytes_f16: int
    bytes_now: int
    slots: dict[str, int]  # of each tier


@dataclass(frozen=True)
class Shown:
    """A picture in f16 cells: the runs of vision tokens (first position, end and part), where text goes on, the last position, and the state of sequence 0."""

    spans: list[tuple[int, int, Encoded]]
    n_past: int
    last: int
    state: bytearray


class Cache:
    """One context: holds a picture, then answers about it."""

    def __init__(self, vlm: Vlm, setting: Setting, n_ctx: int, n_questions: int, flash_attn: bool = True, watch: object = None) -> None:
        """watch: an evaluation callback of ggml's scheduler. Raises EvalError."""
        self.vlm, self.setting = vlm, setting
        self.llama = vlm.llama
        p = self.llama.llama_context_default_params()
        p.n_ctx, p.n_batch = n_ctx, min(n_ctx, 2048)
        p.n_ubatch = p.n_batch  # some models need a picture in one batch
        p.n_seq_max, p.kv_unified = n_questions + 1, True
        p.n_threads = p.n_threads_batch = vlm.threads
        p.flash_attn_type = 1 if flash_attn != setting.floor else 0
        p.type_k, p.type_v = (1, 1) if setting.vision else (CACHE_TYPES[setting.k], CACHE_TYPES[setting.v])
        p.no_perf = True
        if watch is not None:
            p.cb_eval = watch
        self.n_batch = p.n_batch
        capsule = vlm.capsule(setting.capsule) if setting.capsule else None
        wanted = native.Attachment(capsule, n_hot=n_ctx, quality=setting.quality, ratio=setting.ratio, auto_compress=False,
                                   image_attention=setting.image_attention, image_tokens=fixed_tokens(vlm.mmproj))
        self.ctx: int = native.init_context(vlm.model, interrupts.stoppable(p), wanted) or 0
        if not self.ctx:
            raise EvalError(f"{setting.name}: the context cannot be created: {native.why_no_context(vlm.model, n_ctx, capsule is not None, 'see the log (-v)')}")
        self.memory = self.llama.llama_get_memory(self.ctx)
        self.n_past = 0

    def close(self) -> None:
        self.llama.llama_free(self.ctx)

    def show(self, picture: Picture, shown: dict[tuple[Path | None, str], Shown]) -> CacheUse:
        """Forgets everything, decodes a picture and compresses it; says what that takes.

        shown: the same picture before it was compressed, by capsule. f16 cells are copied from there, or put there: they are the same at every quality."""
        key = self.setting.capsule, self.setting.image_attention
        if not self.setting.f16_cells:
            return self._shrink(self.decode(picture))
        if key in shown:
            return self._shrink(self._copy(shown[key]))
        spans = self.decode(picture)
        data = state(self.llama, self.ctx, 0)
        if data is not None:
            shown[key] = Shown(spans, self.n_past, self.llama.llama_memory_seq_pos_max(self.memory, 0), data)
        return self._shrink(spans)

    def _copy(self, shown: Shown) -> list[tuple[int, int, Encoded]]:
        self.llama.llama_memory_clear(self.memory, True)
        if not restore(self.llama, self.ctx, 0, shown.state, shown.last):
            raise EvalError(f"{self.setting.name}: the picture cannot be copied from another context")
        self.n_past = shown.n_past
        return shown.spans

    def decode(self, picture: Picture, each: Callable[[], None] = lambda: None) -> list[tuple[int, int, Encoded]]:
        """Forgets everything and decodes pictures -> first position, end and part of every run of vision tokens. each: called after a run."""
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
                spans.append((start, self.n_past, part))
                each()
            else:
                self._decode([(t, self.n_past + i, 0, False) for i, t in enumerate(part)])
                self.n_past += len(part)
        return spans

    def _shrink(self, spans: list[tuple[int, int, Encoded]]) -> CacheUse:
        shapes = native.layer_shapes(self.vlm.model)
        n = sum(len(part.embd) for *_, part in spans)
        f16 = int(Setting("f16").bytes_per_token(shapes) * n)
        if self.setting.capsule:
            for p0, p1, _ in [] if self.setting.uncompressed else spans:
                native.compress(self.ctx, 0, p0, p1)
            s = native.stats(self.ctx)
            return CacheUse(s.kv_bytes_f16, s.kv_bytes, s.slots)
        if self.setting.vision:
            self._quantize(shapes, [(p0, p1) for p0, p1, _ in spans])
        kept = n
        if self.setting.drop:
            for p0, _, part in spans:
                for a, b in dropped(len(part.embd), self.setting.drop):
                    self.llama.llama_memory_seq_rm(self.memory, 0, p0 + a, p0 + b)
                    kept -= b - a
        return CacheUse(f16, int(self.setting.bytes_per_token(shapes) * kept), {})

    def _quantize(self, shapes: list[native.LayerShape], spans: list[tuple[int, int]]) -> None:
        """The cells of these positions, by way of the state of sequence 0."""
        data = state(self.llama, self.ctx, 0)
        if data is None:
            raise EvalError(f"{self.setting.name}: the state of the context cannot be read")
        last = self.llama.llama_memory_seq_pos_max(self.memory, 0)
        try:
            caches = vision_cells.read(data, places=self.vlm.many_positions)
        except ValueError as error:
            raise EvalError(f"{self.setting.name}: {error}") from None
        vision_cells.quantize(self.vlm.native, caches, spans, shapes, self.setting.k, self.setting.v)
        if not restore(self.llama, self.ctx, 0, data, last):
            raise EvalError(f"{self.setting.name}: the state of the context cannot be put back")

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
            n_wanted = sum(row[3] for row in rows)
            if not n_wanted:
                return np.empty((0, self.vlm.n_vocab), np.float32)
            found = c.cast(self.llama.llama_get_logits(self.ctx), FLOATS)
            return np.array(np.ctypeslib.as_array(found, (n_wanted, self.vlm.n_vocab)))
        finally:
            self.llama.llama_batch_free(batch)
