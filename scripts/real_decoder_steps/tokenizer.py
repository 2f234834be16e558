"""The model's own tokenizer, as llama.cpp has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def tokenizer(model: Path) -> Callable[[str], list[int]]:
    from kvcapsule_gguf import native

    native.load()
    import llama_cpp

    vocabulary = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    return lambda text: vocabulary.tokenize(text.encode(), add_bos=False, special=True)
