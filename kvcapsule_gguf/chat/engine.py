"""Model, projector, capsule and context, loaded in this order and freed in the opposite one."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

from .. import native
from ..format.projector import check_projector, fixed_tokens, has_m_rope
from ..native.shapes import metadata
from ..reuse.binding import binding
from ..reuse.prefixes import Prefixes
from ..runtime import interrupts
from ..runtime.errors import KVCapsuleError
from ..runtime.marker import MARKER
from . import capsules, files, hub
from .args import CACHE_TYPES, DEFAULT_CTX, FLASH_ATTN, LOAD_MODES, Options
from .devices import choose_devices
from .log import Log


class Engine:
    """The loaded parts; `mtmd_ctx` and `capsule` are None when there are none. `say` prints a line for the user."""

    # what is to be done where there is not room enough
    more_ubatch = "raise -ub (and -b)"

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        """Raises KVCapsuleError; nothing stays loaded then."""
        self.options = options
        self.say = say
        self.capsule: native.Capsule | None = None
        self._capsule_optional = False
        self.capsule_path: Path | None = None
        self.capsule_line = ""  # for the user: which one is used
        self.mtmd_ctx: int | None = None
        self.prefixes: Prefixes | None = None
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, stack: ExitStack) -> None:
        options = self.options
        path, mmproj = hub.fetch(options.hf_repo, options.offline, options.hf_token) if options.hf_repo else (options.model, options.mmproj)
        assert path is not None
        self.path = files.check_model(path)
        self.mmproj = files.find_mmproj(self.path, options.mmproj or mmproj) if options.use_mmproj else None
        if self.mmproj is None and options.images:
            raise KVCapsuleError("pictures need a vision projector: give it with --mmproj, or put mmproj*.gguf beside the model")
        if self.mmproj is None and options.capsule not in (files.AUTO, files.NO_FILE, "off"):
            raise KVCapsuleError("a capsule needs a vision projector: give it with --mmproj, or put mmproj*.gguf beside the model")
        # chosen here or not at all
        os.environ.pop(capsules.VARIABLE, None)
        self.native = native.load()
        self.llama = self.native.llama
        self.log = Log(self.native, options.verbose, self.mmproj is not None)
        self.llama.llama_backend_init()
        self._open_model(stack)
        if self.mmproj is not None:
            self._open_projector(stack)
            self._open_capsule(stack)
        self._open_context(stack)
        if options.image_cache is not None and self.mmproj is not None:
            try:
                self.prefixes = Prefixes(options.image_cache, options.image_cache_mib, self.binding, self.llama, self.say)
            except OSError as error:
                raise KVCapsuleError(f"--image-cache {options.image_cache}: {error.strerror or error}") from None

    def _open_model(self, stack: ExitStack) -> None:
        params = self.llama.llama_model_default_params()
        if self.options.n_gpu_layers is not None:
            params.n_gpu_layers = self.options.n_gpu_layers
        if self.options.load_mode is not None:
            params.load_mode = LOAD_MODES[self.options.load_mode]
        handles = choose_devices(self.options)
        if handles is not None:
            params.devices = handles
        self.model = self.llama.llama_model_load_from_file(os.fsencode(self.path), interrupts.stoppable(params))
        if not self.model:
            raise KVCapsuleError(f"{self.path} cannot be loaded: {self.log.take() or 'unknown reason (-v shows the log)'}")
        stack.callback(self.llama.llama_model_free, self.model)
        if not self.llama.llama_model_has_decoder(self.model) or self.llama.llama_model_has_encoder(self.model):
            raise KVCapsuleError(f"{self.path} is not a decoder-only model, it cannot chat")
        self.vocab = self.llama.llama_model_get_vocab(self.model)
        if self.llama.llama_vocab_type(self.vocab) == self.llama.LLAMA_VOCAB_TYPE_NONE:
            raise KVCapsuleError(f"{self.path} has no vocabulary, it cannot chat")
        self.architecture = metadata(self.model, "general.architecture") or ""

    def _open_projector(self, stack: ExitStack) -> None:
        mtmd = self.native.mtmd
        assert self.mmproj is not None
        check_projector(self.mmproj, has_m_rope(self.llama, self.model))
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = self.options.n_gpu_layers != 0 and self.options.device != "none"
        params.print_timings = False
        params.warmup = False
        params.media_marker = MARKER.encode()
        params.n_threads = self.options.threads_batch or self.threads()
        params.flash_attn_type = FLASH_ATTN[self.options.flash_attn]
        params.image_min_tokens = self.options.image_min_tokens
        params.image_max_tokens = self.options.image_max_tokens
        self.mtmd_ctx = mtmd.mtmd_init_from_file(os.fsencode(self.mmproj), self.model, interrupts.stoppable(params))
        if not self.mtmd_ctx:
            raise KVCapsuleError(f"{self.mmproj} cannot be used with {self.path.name}: {self.log.take() or 'unknown reason (-v shows the log)'}")
        stack.callback(mtmd.mtmd_free, self.mtmd_ctx)
        if self.options.images and not mtmd.mtmd_support_vision(self.mtmd_ctx):
            raise KVCapsuleError(f"{self.mmproj} is not a vision projector")

    def _open_capsule(self, stack: ExitStack) -> None:
        setting = self.options.capsule
        if setting == "off":
            return
        if not self.native.has_capsule:
            if setting not in (files.AUTO, files.NO_FILE):
                self.native.require_capsule()
            self._without_capsule("this llama.cpp has none (scripts/setup builds one that has)")
            return
        chosen = capsules.choose(setting, self.model, self.path, self.mmproj, self.architecture)
        if chosen.capsule is None:
            self._without_capsule(chosen.reason)
            return
        stack.callback(chosen.capsule.close)
        self.capsule, self.capsule_path, self._capsule_optional = chosen.capsule, chosen.path, chosen.optional
        self.capsule_line = capsules.described(chosen.path, self.options.quality, self.options.ratio)

    def _without_capsule(self, reason: str) -> None:
        self.capsule = self.capsule_path = None
        self.capsule_line = ""
        self.say(capsules.uncompressed(reason))

    def _open_context(self, stack: ExitStack) -> None:
        options = self.options
        trained = self.llama.llama_model_n_ctx_train(self.model)
        params = self.llama.llama_context_default_params()
        params.n_ctx = min(DEFAULT_CTX, trained) if options.n_ctx is None else options.n_ctx
        params.n_batch = options.n_batch
        params.n_ubatch = min(options.n_ubatch, options.n_batch)
        params.n_threads, params.n_threads_batch = self.threads(), options.threads_batch or self.threads()
        params.flash_attn_type = FLASH_ATTN[options.flash_attn]
        params.type_k = CACHE_TYPES[options.cache_type_k]
        params.type_v = CACHE_TYPES[options.cache_type_v]
        params.no_perf = True
        params.offload_kqv = options.kv_offload
        otherwise = self._without_capsule if self._capsule_optional else None
        wanted = native.Attachment(self.capsule, n_hot=options.n_hot, quality=options.quality or 0, ratio=options.ratio or 0, otherwise=otherwise, image_attention=options.image_attention,
                                   image_tokens=fixed_tokens(self.mmproj) if self.mmproj else 0)
        self.ctx: int = native.init_context(self.model, interrupts.stoppable(params), wanted) or 0
        if not self.ctx:
            raise KVCapsuleError(f"the context cannot be created: {native.why_no_context(self.model, params.n_ctx, self.capsule is not None, self.log.take())}")
        stack.callback(self.llama.llama_free, self.ctx)
        self.memory = self.llama.llama_get_memory(self.ctx)
        self.n_ctx = self.llama.llama_n_ctx(self.ctx)

    @cached_property
    def binding(self) -> str:
        """What a state on disk must have been saved with to be used here."""
        options = self.options
        names = ("cache_type_k", "cache_type_v", "flash_attn", "image_min_tokens", "image_max_tokens", "quality", "ratio", "image_attention")
        settings = {"n_ctx": self.n_ctx, "compressed": self.capsule is not None, **{name: getattr(options, name) for name in names}}
        return binding(self.path, self.mmproj, self.capsule_path, settings, self.native.directory)

    def threads(self) -> int:
        if self.options.threads:
            return self.options.threads
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # beyond a few, the logical ones are usually two to a core
        return cores if cores <= 4 else cores // 2

    def piece(self, token: int, special: bool = False) -> bytes:
        """The text of a token."""
        buffer = ctypes.create_string_buffer(256)
        n = self.llama.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = self.llama.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:n]


def say(text: str) -> None:
    print(f"kvcapsule-chat: {text}", file=sys.stderr, flush=True)
