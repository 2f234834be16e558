"""A sequence in the memory of a llama_context: its state as bytes, and going back to an earlier position.

`llama` is libllama (native.Library); `ctx` and `model` are its pointers.
"""

from __future__ import annotations

import ctypes

from ..native.library import Library


def state(llama: Library, ctx: int, seq: int) -> bytearray | None:
    """The state of a sequence, slots of a capsule included; None if the library cannot give it."""
    size = llama.llama_state_seq_get_size(ctx, seq)
    if size <= 0:
        return None
    data = bytearray(size)
    written = llama.llama_state_seq_get_data(ctx, _buffer(data), size, seq)
    if not 0 < written <= size:
        return None
    del data[written:]
    return data


def restore(llama: Library, ctx: int, seq: int, data: bytearray | memoryview, pos_max: int) -> bool:
    """Replaces the sequence; it is empty when that fails. pos_max: the last position it must have then."""
    memory = llama.llama_get_memory(ctx)
    llama.llama_memory_seq_rm(memory, seq, -1, -1)
    read = llama.llama_state_seq_set_data(ctx, _buffer(data), len(data), seq)
    if read == len(data) and llama.llama_memory_seq_pos_max(memory, seq) == pos_max:
        return True
    if not llama.llama_memory_seq_rm(memory, seq, -1, -1):
        llama.llama_memory_clear(memory, True)
    return False


def rewind(llama: Library, ctx: int, model: int, seq: int, n_past: int) -> bool:
    """Forgets positions from n_past on; False if the model cannot go back that far, and nothing is left then."""
    memory = llama.llama_get_memory(ctx)
    window = llama.llama_model_n_swa(model)
    if n_past > llama.llama_memory_seq_pos_max(memory, seq):
        return True  # nothing is there
    if n_past > 0:
        # sliding-window layers may have dropped what the first new token still attends to
        seen = window == 0 or llama.llama_memory_seq_pos_min(memory, seq) <= max(0, n_past - window)
        if seen and llama.llama_memory_seq_rm(memory, seq, n_past, -1):
            return True
    llama.llama_memory_clear(memory, True)
    return n_past == 0


def _buffer(data: bytearray | memoryview) -> ctypes.Array:
    return (ctypes.c_uint8 * len(data)).from_buffer(data)
