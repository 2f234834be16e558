"""llama-cpp-python's own API on the patched library: a Llama that keeps pictures compressed, and reads each of them once.

A Llama is one context: it refuses a second thread, and a stream is finished (or closed) before the next request. Several of them may run in several
threads. Importing this loads the library and llama-cpp-python on top of it, so it comes before any other import of llama_cpp. Raises native.NativeError when that is impossible.
"""

from .. import native

native.llama_cpp()

from ..chat.stats import ImageUse  # noqa: E402
from .handler import KVCapsuleChatHandler, PromptStats  # noqa: E402
from .llama import KVCapsuleLlama  # noqa: E402
from .quiet import keep_descriptors  # noqa: E402

keep_descriptors()

__all__ = ["ImageUse", "KVCapsuleChatHandler", "KVCapsuleLlama", "PromptStats"]
