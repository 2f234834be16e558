"""KVCapsule: the KV cache of images, compressed, in llama.cpp. Each part brings what it needs; the names below are loaded when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import KVCapsuleChatHandler, KVCapsuleLlama

__version__ = "0.1.0"
__all__ = ["KVCapsuleChatHandler", "KVCapsuleLlama"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from .runtime.interrupts import Interrupts

        with Interrupts(guest=True):  # it takes a moment, and Python's import drops a KeyboardInterrupt in some places
            from . import api
        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
