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
from .capsule import make_capsule
from .context import TEXT_ROOM, Bench
from .demo import read_pictures
from .geometry import Geometry
from .run import Run
from .settings import Setting
from .timing import BenchError, in_turns

DEFAULT = ("pca", "retain")
LAYERS = 2
ALL, NONE = 1e30, 1e-30  # kappa: the guard accepts every block, or none


@dataclass(frozen=True)
class CompressRow:
    """Seconds of one layer, of one image. `seconds`: the guard accepts all blocks; `worst_seconds`: it refuses all of them, in the last layer, so that all is done twice.

    `share` and `worst_share` are those of the time that decoding the image takes (with the demo model also encoding it), medians of the ratios within a round."""

    geometry: str
    setting: str
    threads: int
    tokens: int
    layers: int
    seconds: float
    worst_seconds: float | None
    prefill_seconds: float
    share: float
    worst_share: float | None


class Image:
    """One image in a context of its own: what it takes to decode it, and to compress it. Raises BenchError."""

    def __init__(self, bench: Bench, setting: Setting, last_kappa: float) -> None:
        self.g, self.llama, self.name = bench.geometry, bench.llama, setting.name
        self.clock = bench.run.clock
        self.tier = 0 if last_kappa == ALL else 1
        path = bench.capsule_path(setting, f"-{last_kappa}")
        if not path.exists():
            make_capsule(bench.path, path, setting, bench.run.shape, self.g.side, [ALL] * (self.g.n_layer - 1) + [last_kappa])
        self.capsule = native.Capsule.load(bench.model, path)
        p = self.llama.llama_context_default_params()
        p.n_ctx = self.g.image_tokens + TEXT_ROOM
        p.n_batch = p.n_ubatch = self.g.image_tokens
        p.type_k = p.type_v = CACHE_TYPES[setting.cache]
        p.flash_attn_type = int(setting.flash)
        p.n_threads = p.n_threads_batch = bench.run.threads
        self.ctx: int = native.init_context(bench.model, interrupts.stoppable(p), native.Attachment(self.capsule, n_hot=p.n_ctx, auto_compress=False)) or 0
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
        if moved != self.g.image_tokens or not native.stats(self.ctx).n_slots[self.tier]:
            raise BenchError(f"{self.name}: {moved} of {self.g.image_tokens} tokens were compressed")
        self.clear()
        return took

    def clear(self) -> None:
        self.llama.llama_memory_seq_rm(self.memory, 0, -1, -1)

    def close(self) -> None:
        self.llama.llama_free(self.ctx)
        self.capsule.close()


def measure_compress(geometry: Geometry, settings: list[Setting], run: Run) -> list[CompressRow]:
    """Raises BenchError."""
    g = replace(geometry, name=f"{geometry.name}-{LAYERS}-layers", n_layer=LAYERS, n_vocab=64)
    rows = []
    with Bench(g, run) as bench:
        for setting in settings:
            with ExitStack() as stack:
                accepted, refused = (stack.enter_context(closing(Image(bench, setting, kappa))) for kappa in (ALL, NONE))
                t = in_turns({"prefill": accepted.prefill, "accepted": accepted.compress, "refused": refused.compress}, run.rounds)
            seconds = {name: median(times) / LAYERS for name, times in t.items()}
            share, worst = (median(a / b for a, b in zip(t[name], t["prefill"])) for name in ("accepted", "refused"))
            rows.append(CompressRow(geometry.name, setting.name, run.threads, g.image_tokens, geometry.n_layer, seconds["accepted"], seconds["refused"],
                                    seconds["prefill"], share, worst))
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
    return [CompressRow("demo", "capsule FA", run.threads, turns[0].vision_tokens, layers, seconds, None, prefill, share, None)]
