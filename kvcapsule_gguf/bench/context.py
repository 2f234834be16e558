"""A context with one of the settings, filled with images, and the time that a batch takes in it."""

from __future__ import annotations

import ctypes as c
import os
import struct
import time

from .. import native
from ..chat.args import CACHE_TYPES
from ..chat.log import Log
from ..chat.stats import BITS
from ..runtime import interrupts
from .fill import ImageState, vision_part
from .geometry import Geometry
from .model import get_model
from .run import Run
from .settings import Setting
from .timing import BenchError, decode

TEXT_ROOM, SEQ = 512, 1  # cells; images are read into this sequence and move to 0


class Bench:
    """The model of a geometry, loaded."""

    def __init__(self, geometry: Geometry, run: Run) -> None:
        self.geometry, self.run = geometry, run
        path = get_model(geometry, run.folder)
        self.native = native.load()
        self.native.require_capsule()
        self.llama = self.native.llama
        Log(self.native, False, False)
        self.llama.llama_backend_init()
        options = self.llama.llama_model_default_params()
        options.n_gpu_layers = run.gpu_layers
        self.model = self.llama.llama_model_load_from_file(os.fsencode(path), interrupts.stoppable(options))
        if not self.model:
            raise BenchError(f"{path} cannot be loaded as a model")
        self._capsule: native.Capsule | None = None

    @property
    def capsule(self) -> native.Capsule:
        """The built-in one."""
        if self._capsule is None:
            self._capsule = native.Capsule.builtin(self.model)
        return self._capsule

    def close(self) -> None:
        if self._capsule is not None:
            self._capsule.close()
        self.llama.llama_model_free(self.model)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Context:
    """n images of a setting. Raises BenchError."""

    def __init__(self, bench: Bench, setting: Setting, n: int) -> None:
        self.bench, self.setting, self.llama, self.n = bench, setting, bench.llama, n
        g = bench.geometry
        self.compressed_s = 0.0
        p = self.llama.llama_context_default_params()
        p.n_ctx = n * g.image_tokens + TEXT_ROOM
        p.n_batch = p.n_ubatch = 512
        p.n_seq_max, p.kv_unified = 2, True
        p.type_k, p.type_v = CACHE_TYPES[setting.cache], CACHE_TYPES[setting.cache_v]
        p.flash_attn_type = int(setting.flash)
        p.n_threads = p.n_threads_batch = bench.run.threads
        hot = p.n_ctx if setting.hot else g.image_tokens + TEXT_ROOM
        wanted = native.Attachment(bench.capsule if setting.capsule else None, n_hot=hot, ratio=setting.ratio if setting.capsule else 0.0, auto_compress=False)
        self.ctx: int = native.init_context(bench.model, interrupts.stoppable(p), wanted) or 0
        if not self.ctx:
            raise BenchError(f"no context for {setting.name} with {n} images: {native.last_error() or 'not enough memory?'}")
        self.memory = self.llama.llama_get_memory(self.ctx)
        self._fill(n)

    def _fill(self, n: int) -> None:
        g, setting, llama = self.bench.geometry, self.setting, self.llama
        image = ImageState(g, setting.cache, setting.cache_v, not setting.flash)
        data = image.data() if n else b""
        empty = self._save()  # magic, sequence, number of streams, 0 cells; what a capsule adds
        for i in range(n):
            first = i * g.image_positions
            tail = vision_part(empty[16:], first, first + g.image_positions) if setting.capsule and not g.mrope else empty[16:]
            state = empty[:12] + struct.pack("<I", g.image_tokens) + image.cells(first) + data + tail
            read = llama.llama_state_seq_set_data(self.ctx, (c.c_uint8 * len(state)).from_buffer_copy(state), len(state), SEQ)
            if read != len(state):
                raise BenchError(f"{setting.name}: the state of an image of {len(state)} bytes was not read")
            if setting.capsule and (i == 0 or not setting.hot):
                before = time.process_time()
                moved = native.compress(self.ctx, SEQ, first, first + g.image_positions)
                self.compressed_s += time.process_time() - before
                if moved != g.image_tokens:
                    raise BenchError(f"{setting.name}: {moved} of {g.image_tokens} tokens were compressed")
            llama.llama_memory_seq_cp(self.memory, SEQ, 0, 0, -1)
            llama.llama_memory_seq_rm(self.memory, SEQ, -1, -1)

    def _save(self) -> bytes:
        size = self.llama.llama_state_seq_get_size(self.ctx, SEQ)
        buffer = (c.c_uint8 * size)()
        self.llama.llama_state_seq_get_data(self.ctx, buffer, size, SEQ)
        return bytes(buffer)

    def decode(self, n: int) -> float:
        return decode(self.llama, self.ctx, n, self.bench.run.clock)

    def kv_bytes(self) -> int:
        """Of all images: slots, or cells."""
        g = self.bench.geometry
        cells = int(self.n * g.image_tokens * g.kv_bytes_f16 * (BITS[self.setting.cache] + BITS[self.setting.cache_v]) / 32)
        return native.stats(self.ctx).kv_bytes if self.setting.capsule else cells

    def close(self) -> None:
        self.llama.llama_free(self.ctx)
