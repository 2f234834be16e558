"""llama_cpp.Llama with a capsule: projector and capsule are found as in kvcapsule-chat."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

from llama_cpp import Llama

from .. import native
from ..chat import capsules, files
from ..chat.args import DEFAULT_CTX, IMAGE_ATTENTION
from ..chat.stats import ImageUse
from ..format.projector import check_projector, fixed_tokens, has_m_rope
from ..native.shapes import metadata
from ..reuse.prefixes import DEFAULT_MIB
from ..runtime import interrupts
from ..runtime.errors import KVCapsuleError
from . import pretrained
from .alone import Alone, alone
from .handler import KVCapsuleChatHandler, PromptStats
from .quiet import info, reasons, say

VARIABLES = (capsules.VARIABLE, *(f"{capsules.VARIABLE}_{name}" for name in ("HOT", "QUALITY", "RATIO", "IMAGE_ATTENTION")))
_lock = threading.Lock()
_inside = 0
_taken: dict[str, str] = {}


@contextmanager
def _without_environment() -> Iterator[None]:
    """LLAMA_KVCAPSULE is for contexts of programs that know nothing of capsules: here the arguments say it all, "off" included. Several threads may be
    inside; the last one puts the variables back."""
    global _inside
    with _lock:
        _inside += 1
        _taken.update({name: os.environ.pop(name) for name in VARIABLES if name in os.environ})
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                os.environ.update(_taken)
                _taken.clear()


def _environment() -> dict[str, str]:
    """The variables, also while they are taken."""
    with _lock:
        return {name: os.environ[name] for name in VARIABLES if os.environ.get(name)} | _taken


def _variable(name: str) -> float | None:
    """Raises ValueError."""
    text = _environment().get(f"{capsules.VARIABLE}_{name}")
    try:
        return float(text) if text else None
    except ValueError:
        raise ValueError(f"{capsules.VARIABLE}_{name}: {text} is not a number") from None


_open: WeakSet[KVCapsuleLlama] = WeakSet()


@atexit.register
def _end() -> None:
    """Closes what is open while Python is still whole; but a thread that is left behind may be in the middle of something."""
    if threading.active_count() == 1:
        for llama in list(_open):
            llama.close()


class KVCapsuleLlama(Llama):
    """A Llama for pictures. create_chat_completion() and everything else are llama-cpp-python's.

    mmproj: projector, default: mmproj*.gguf beside the model; capsule: "auto", "built-in", "off" or a file; hot: cells of the uncompressed cache, 0 = room for text
    and one picture; quality: as in kvcapsule-chat, None = the capsule's; ratio: share to save, in place of a quality; image_attention: "auto" or "full", as in kvcapsule-chat; image_cache,
    image_cache_mib: a folder for read pictures and its limit; n_ctx: default 8192, or what the model was trained with, if that is less. The rest goes to Llama.

    One thread at a time: whatever uses the context refuses another thread with a RuntimeError, and a stream counts until it ends or is closed. Close it, or
    use it in a with statement. Raises ValueError, native.NativeError, native.CapsuleError."""

    _alone: Alone

    create_chat_completion, create_completion = alone(Llama.create_chat_completion), alone(Llama.create_completion)
    create_embedding, embed = alone(Llama.create_embedding), alone(Llama.embed)
    eval, sample, generate, reset = alone(Llama.eval), alone(Llama.sample), alone(Llama.generate), alone(Llama.reset)
    save_state, load_state = alone(Llama.save_state, ends_stream=False), alone(Llama.load_state)
    close = alone(Llama.close, during_stream=True)

    def __new__(cls, *arguments: Any, **options: Any) -> KVCapsuleLlama:
        llama = super().__new__(cls)
        llama._alone, llama._stack = Alone(), ExitStack()  # close() needs them, also where __init__ never began
        return llama

    def __init__(self, model_path: str | Path, *, mmproj: str | Path | None = None, capsule: str | Path = "auto", hot: int = 0, quality: float | None = None, ratio: float | None = None,
                 image_attention: str | None = None,
                 image_cache: str | Path | None = None, image_cache_mib: int = DEFAULT_MIB, n_ctx: int | None = None, verbose: bool = False, **kwargs: Any) -> None:  # fmt: skip
        try:
            path = files.check_model(Path(model_path))
            self.mmproj = files.find_mmproj(path, Path(mmproj) if mmproj is not None else None)
        except KVCapsuleError as error:
            raise ValueError(str(error)) from None
        if self.mmproj is None and str(capsule) not in (files.AUTO, "off"):
            raise ValueError("a capsule needs a vision projector: give it as mmproj, or put mmproj*.gguf beside the model")
        if kwargs.get("chat_format") is not None:
            raise ValueError("chat_format: the model's own chat template is used; leave this out, or give a chat_handler")
        if hot < 0:
            raise ValueError(f"hot: {hot} is below 0")
        self._setting = capsules.from_variables(str(capsule), _environment())
        self.hot, self.quality, self.ratio = hot or int(_variable("HOT") or 0), quality, ratio
        self._check_amount()
        self.image_attention = image_attention or _environment().get("LLAMA_KVCAPSULE_IMAGE_ATTENTION") or IMAGE_ATTENTION[0]
        if self.image_attention not in IMAGE_ATTENTION:
            raise ValueError(f"image_attention: {self.image_attention} is neither auto nor full")
        self.capsule_path: Path | None = None
        self._attachment: native.Attachment | None = None
        self._optional = False  # where the context cannot have it, it goes without
        self._n_ctx_given = n_ctx is not None
        handler = kwargs.pop("chat_handler", None)
        if handler is None:
            projector = str(self.mmproj) if self.mmproj is not None else None
            handler = KVCapsuleChatHandler(projector, verbose, kwargs.get("n_gpu_layers", 0) != 0, image_cache=image_cache, image_cache_mib=image_cache_mib)
        try:
            with reasons() as said, _without_environment(), interrupts.Interrupts(guest=True), native.attached(self._wanted):
                super().__init__(str(path), n_ctx=DEFAULT_CTX if n_ctx is None else n_ctx, verbose=verbose, chat_handler=handler, **kwargs)
        except BaseException as error:
            reason, with_capsule = said.take(), self._attachment is not None
            if no_context := str(error) == "Failed to create llama_context":
                reason = native.why_no_context(self.model, self.context_params.n_ctx, with_capsule, reason)
            self.close()
            if not isinstance(error, ValueError):
                raise
            if no_context and with_capsule:
                raise native.CapsuleError(reason) from error
            raise ValueError(f"{error}: {reason}" if reason else str(error)) from None
        if isinstance(handler, KVCapsuleChatHandler):
            handler._capsule_path = self.capsule_path
        _open.add(self)

    @property
    def _model(self) -> Any:
        return self.__dict__["_model"]

    @_model.setter
    def _model(self, model: Any) -> None:
        # Llama makes its model, then its context: the capsule belongs to the one and has to be there for the other
        self.__dict__["_model"] = model
        if not self._n_ctx_given:
            self.context_params.n_ctx = min(DEFAULT_CTX, model.n_ctx_train())
        if self.mmproj is None:
            return
        architecture = metadata(model.model, "general.architecture") or ""
        try:
            check_projector(self.mmproj, has_m_rope(native.load().llama, model.model))
            if self._setting == "off":
                return
            chosen = capsules.choose(self._setting, model.model, Path(self.model_path), self.mmproj, architecture)
        except native.CapsuleError:
            raise
        except KVCapsuleError as error:
            raise ValueError(str(error)) from None
        if chosen.capsule is None:
            self._without_capsule(chosen.reason)
            return
        self._stack.callback(chosen.capsule.close)
        self.capsule_path = chosen.path
        self._optional = chosen.optional
        self._attachment = native.Attachment(chosen.capsule, n_hot=self.hot, quality=self.quality or 0, ratio=self.ratio or 0, image_tokens=fixed_tokens(self.mmproj),
                                               image_attention=self.image_attention)
        (say if chosen.path is None and chosen.optional else info)(capsules.described(chosen.path, self.quality, self.ratio))

    def _wanted(self) -> native.Attachment | None:
        # what refers to this object stays outside of it: it is freed with its last reference
        return replace(self._attachment, otherwise=self._without_capsule) if self._attachment and self._optional else self._attachment

    def _without_capsule(self, reason: str) -> None:
        self._attachment = self.capsule_path = None
        say(f'{capsules.uncompressed(reason)} (capsule="off" silences this line)')

    def _check_amount(self) -> None:
        """Arguments win over variables. Raises ValueError."""
        if self.quality is None and self.ratio is None:
            self.quality, self.ratio = _variable("QUALITY"), _variable("RATIO")
        elif self._setting == "off":
            raise ValueError('quality and ratio say how much a capsule saves, and capsule="off" says that there is none: leave one of them out')
        if self.quality is not None and self.ratio is not None:
            raise ValueError("give quality or ratio, not both: a ratio is one tier for everything")
        for name, value, most in (("quality", self.quality, 100), ("ratio", self.ratio, 1)):
            if value is not None and not 0 < value <= most:
                raise ValueError(f"{name}: {value} is not a number above 0 and up to {most}")

    @classmethod
    def from_pretrained(cls, repo_id: str, filename: str | None = None, additional_files: list[str] | None = None, local_dir: str | Path | None = None,  # type: ignore[override]
                        local_dir_use_symlinks: Any = "auto", cache_dir: str | Path | None = None, **kwargs: Any) -> KVCapsuleLlama:  # fmt: skip
        """As Llama.from_pretrained; projector and capsules beside the model come along. repo_id: user/repo or a folder; filename: a name or pattern, None = as
        llama.cpp chooses. local_dir_use_symlinks has no meaning any more. Raises ValueError."""
        try:
            model, mmproj = pretrained.fetch(repo_id, filename, additional_files or [], local_dir=local_dir, cache_dir=cache_dir)
        except KVCapsuleError as error:
            raise ValueError(str(error)) from None
        kwargs.setdefault("mmproj", mmproj)
        return cls(model, **kwargs)

    def prompt_stats(self) -> PromptStats:
        """What the last prompt took: tokens evaluated and reused, pictures encoded and loaded from disk."""
        return self.chat_handler.stats if isinstance(self.chat_handler, KVCapsuleChatHandler) else PromptStats()

    def image_stats(self) -> list[ImageUse]:
        """Each picture of the conversation: its tokens, slots, bytes now and in f16."""
        return self.prompt_stats().images

    def __enter__(self) -> KVCapsuleLlama:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
