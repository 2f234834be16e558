"""A context of ik_llama.cpp, filled with text: runs in a Python that has ik-llama-cpp-python, and needs nothing of this package.

    python ik_worker.py '{"model": path, "tokens": n, "type_k": 1, "type_v": 1, "row_k": bytes, "row_v": bytes, "layers": n, "threads": n}'

Says "ready" on stdout. Then each line of stdin is a number of tokens; the answer is the seconds that a batch of them takes, and its cells are freed again.
A line "error: ..." is the last one.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import struct
import sys
import time
from typing import Any, TextIO

ROOM = 512  # cells beside those that are filled
F16 = 1


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library writes to stdout
    try:
        serve(json.loads(sys.argv[1]), answers)
    except Exception as error:
        print(f"error: {error}", file=answers, flush=True)


def serve(wanted: dict[str, Any], answers: TextIO) -> None:
    """Raises AssertionError when the library refuses something, ImportError without ik-llama-cpp-python."""
    from ik_llama_cpp import _ctypes_api as api

    lib = api._lib
    lib.llama_state_seq_set_data.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int32, ctypes.c_uint32]
    lib.llama_state_seq_set_data.restype = ctypes.c_size_t
    lib.llama_kv_cache_seq_rm.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
    lib.llama_synchronize.argtypes = [ctypes.c_void_p]

    api.llama_backend_init()
    options = api.llama_model_default_params()
    model = api.llama_model_load_from_file(os.fsencode(wanted["model"]), options)
    assert model, "the model cannot be loaded"
    p = api.llama_context_default_params()
    n = wanted["tokens"]
    p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = n + ROOM, 512, 512, 1
    p.n_threads = p.n_threads_batch = wanted["threads"]
    p.type_k, p.type_v, p.flash_attn = wanted["type_k"], wanted["type_v"], True
    ctx = api.llama_init_from_model(model, p)
    assert ctx, "no context"
    if n:
        data = state(n, wanted)
        read = lib.llama_state_seq_set_data(ctx, data, len(data), 0, 0)
        assert read == len(data), f"{read} of {len(data)} bytes of a state were read"
        del data
    clock = time.process_time if wanted["threads"] == 1 else time.perf_counter
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        count = int(line)
        batch = api.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i in range(count):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = 5, n + i, 1, i == count - 1
            batch.seq_id[i][0] = 0
        before = clock()
        failed = api.llama_decode(ctx, batch)
        lib.llama_synchronize(ctx)
        took = clock() - before
        api.llama_batch_free(batch)
        assert not failed, f"llama_decode returned {failed}"
        lib.llama_kv_cache_seq_rm(ctx, 0, n, -1)
        print(took, file=answers, flush=True)


def state(n: int, wanted: dict[str, Any]) -> bytes:
    """A sequence of n tokens as llama_data_write::write_kv_cache of ik_llama.cpp writes it, with the same random rows in every layer."""
    cells = b"".join(struct.pack("<iI", i, 0) for i in range(n))
    parts = [struct.pack("<I", n), cells, struct.pack("<II", 0, wanted["layers"])]
    for kind, row in ((wanted["type_k"], wanted["row_k"]), (wanted["type_v"], wanted["row_v"])):
        one = struct.pack("<iQ", kind, row) + rows(n * row, kind)
        parts += [one] * wanted["layers"]
    return b"".join([*parts, struct.pack("<I", 0)])


def rows(size: int, kind: int) -> bytes:
    """Random f16 numbers below 2, or the blocks of a quantized row with a scale like theirs."""
    data = bytearray(random.Random(0).randbytes(size))
    if kind == F16:
        data[1::2] = bytes(b & 0xBF for b in data[1::2])
        return bytes(data)
    block = 34 if kind == 8 else 18  # q8_0, q4_0: an f16 scale, then codes of 32 values
    scale = struct.pack("<e", 2 / 127 if kind == 8 else 2 / 8)
    data[0::block], data[1::block] = scale[:1] * len(data[0::block]), scale[1:] * len(data[1::block])
    return bytes(data)


if __name__ == "__main__":
    main()
