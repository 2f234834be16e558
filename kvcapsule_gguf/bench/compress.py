"""Compressing an image beside decoding it: two layers of a model with real sizes, or the demo model with real pictures."""

from __future__ import annotations

import ctypes as c
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from .. import native
from ..chat.args import CACHE_TYPES
from ..runtime import interrupts
from .context import TEXT_ROOM, Bench
from .demo import read_pictures
from .geometry import Geometry
from .run import Run
from .settings import Setting
from .timing import BenchError, in_turns

DEFAULT = ("capsule",)
LAYERS = 2


@dataclass(frozen=True)
class CompressRow:
    """Seconds of one layer, of one image. `share`: of the time that decoding the image takes (with the demo model also encoding it), median of the ratios within a round."""

    geometry: str
    setting: str
    threads: int
    tokens: int
    layers: int
    seconds: float
    prefill_seconds: float
    share: float


class Image:
    """One image in a context of its own: what it takes to decode it, and to compress it. Raises BenchError."""

    def __init__(self, bench: Bench, setting: Setting) -> None:
        self.g, self.llama, self.name = bench.geometry, bench.llama, setting.name
        self.clock = bench.run.clock
        p = self.llama.llama_context_default_params()
        p.n_ctx = self.g.image_tokens + TEXT_ROOM
        p.n_batch = p.n_ubatch = self.g.image_tokens
        p.type_k, p.type_v = CACHE_TYPES[setting.cache], CACHE_TYPES[setting.cache_v]
        p.flash_attn_type = int(setting.flash)
        p.n_threads = p.n_threads_batch = bench.run.threads
        self.ctx: int = native.init_context(bench.model, interrupts.stoppable(p), native.Attachment(bench.capsule, n_hot=p.n_ctx, auto_compress=False)) or 0
        if not self.ctx:
            raise BenchError(f"no context for {setting.name}: {native.last_error() or 'not enough memory?'}")
        self.memory = self.llama.llama_get_memory(self.ctx)
        self.decode()
        size = self.llama.llama_state_seq_get_size(self.ctx, 0)
        self.state = (c.c_uint8 * size)()
        self.llama.llama_state_seq_get_data(self.ctx, self.state, size, 0)
        self.clear()

    def decode(self) -> float:
        """Seconds; the cells stay."""
        n = self.g.image_tokens
        x = np.random.default_rng(0).standard_normal((n, self.g.n_embd)).astype(np.float32)
        t = np.zeros(n, np.int32)
        y, x_at = np.divmod(np.arange(n, dtype=np.int32), self.g.side)
        pos = np.stack([t, y, x_at, t]) if self.g.mrope else np.arange(n, dtype=np.int32)
        batch = self.llama.llama_batch(n_tokens=n, embd=x.ctypes.data_as(c.POINTER(c.c_float)), pos=pos.ctypes.data_as(c.POINTER(c.c_int32)))
        before = self.clock()
        failed = self.llama.llama_decode(self.ctx, batch)
        self.llama.llama_synchronize(self.ctx)
        took = self.clock() - before
        if failed:
            raise BenchError(f"llama_decode returned {failed}")
        return took

    def prefill(self) -> float:
        took = self.decode()
        self.clear()
        return took

    def compress(self) -> float:
        if self.llama.llama_state_seq_set_data(self.ctx, self.state, len(self.state), 0) != len(self.state):
            raise BenchError(f"{self.name}: the state of an image was not read")
        before = self.clock()
        moved = native.compress(self.ctx, 0, 0, self.g.image_positions)
        took = self.clock() - before
        if moved != self.g.image_tokens:
            raise BenchError(f"{self.name}: {moved} of {self.g.image_tokens} tokens were compressed")
        self.clear()
        return took

    def clear(self) -> None:
        self.llama.llama_memory_seq_rm(self.memory, 0, -1, -1)

    def close(self) -> None:
        self.llama.llama_free(self.ctx)


def measure_compress(geometry: Geometry, settings: list[Setting], run: Run) -> list[CompressRow]:
    """Raises BenchError."""
    g = replace(geometry, name=f"{geometry.name}-{LAYERS}-layers", n_layer=LAYERS, n_vocab=64)
    rows = []
    with Bench(g, run) as bench:
        for setting in settings:
            with closing(Image(bench, setting)) as image:
                t = in_turns({"prefill": image.prefill, "compress": image.compress}, run.rounds)
            seconds, prefill = (median(t[name]) / LAYERS for name in ("compress", "prefill"))
            share = median(a / b for a, b in zip(t["compress"], t["prefill"]))
            rows.append(CompressRow(geometry.name, setting.name, run.threads, g.image_tokens, geometry.n_layer, seconds, prefill, share))
    return rows


def measure_compress_demo(model: Path, run: Run) -> list[CompressRow]:
    """Wall time of run.rounds pictures. Raises KVCapsuleError."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine, turns = read_pictures(stack, model, ["-t", str(run.threads)], run.rounds + 1, folder)
        layers = engine.llama.llama_model_n_layer(engine.model)
    turns = turns[1:]  # the first one builds the graphs
    seconds, prefill = (median(x) / layers for x in ([t.compress_s for t in turns], [t.prefill_s for t in turns]))
    share = median(t.compress_s / t.prefill_s for t in turns)
    return [CompressRow("demo", "capsule FA", run.threads, turns[0].vision_tokens, layers, seconds, prefill, share)]
