"""Runs scripted llama.cpp contexts in a subprocess, against the stock or the patched library.

The two libraries can not be loaded in one process (same SONAMEs), so a list of cases, each a context and a list of steps, is handed to
`python llama_runner.py JOB.json OUT_DIR` with LLAMA_CPP_LIB_PATH set; every case comes back as one .npz and one .json. A case that takes
the process down (an assert in the library) becomes its `error`, and the cases after it run in a new process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Step = dict[str, Any]
ALL = 1 << 30  # a position behind every token

# --- steps -----------------------------------------------------------------------------------------------------------------------------------


def tokens(n: int, seed: int = 0, n_vocab: int = 160) -> list[int]:
    return np.random.default_rng(1000 + seed).integers(0, n_vocab, n).tolist()


def text(n: int | list[int], seed: int = 0, seq: int = 0, one_by_one: bool = False, may_fail: bool = False) -> Step:
    """Decodes tokens (n random ones or a list) and returns all their logits; one_by_one: a batch for each, as in generation."""
    ids = tokens(n, seed) if isinstance(n, int) else n
    return {"op": "text", "tokens": ids, "seq": seq, "one_by_one": one_by_one, "may_fail": may_fail}


def together(ids: Mapping[int, int]) -> Step:
    """Decodes one token for each of several sequences, {seq: token}, in one batch."""
    return {"op": "together", "tokens": {str(s): t for s, t in ids.items()}}


def image(n: int | tuple[int, int], seed: int = 0, seq: int = 0, scale: float = 1.0, may_fail: bool = False) -> Step:
    """Decodes n tokens, or an (h, w) grid, of random embeddings as an image, in sub-batches of n_batch, with the positions mtmd gives them."""
    h, w = n if isinstance(n, tuple) else (1, n)
    return {"op": "image", "h": h, "w": w, "seed": seed, "seq": seq, "scale": scale, "may_fail": may_fail}


def image_file(path: Path, h: int, w: int, seq: int = 0) -> Step:
    """The same with embeddings [h*w, n_embd] from an .npy file."""
    return {"op": "image", "h": h, "w": w, "file": str(path), "seq": seq, "may_fail": False}


def mixed(*parts: Step, seq: int = 0) -> Step:
    """Decodes texts and images, steps as text() and image() give them, in one batch."""
    return {"op": "mixed", "parts": list(parts), "seq": seq}


def compress(seq: int = 0, p0: int = 0, p1: int = ALL) -> Step:
    return {"op": "compress", "seq": seq, "p0": p0, "p1": p1}


def seq_rm(seq: int, p0: int, p1: int = -1) -> Step:
    return {"op": "seq_rm", "seq": seq, "p0": p0, "p1": p1}


def seq_cp(src: int, dst: int, p0: int = -1, p1: int = -1) -> Step:
    return {"op": "seq_cp", "src": src, "dst": dst, "p0": p0, "p1": p1}


def seq_keep(seq: int) -> Step:
    return {"op": "seq_keep", "seq": seq}


def seq_add(seq: int, p0: int, p1: int, delta: int) -> Step:
    return {"op": "seq_add", "seq": seq, "p0": p0, "p1": p1, "delta": delta}


def seq_div(seq: int, p0: int, p1: int, d: int) -> Step:
    return {"op": "seq_div", "seq": seq, "p0": p0, "p1": p1, "d": d}


def clear() -> Step:
    return {"op": "clear"}


def set_pos(seq: int, pos: int) -> Step:
    """The position of the next token of a sequence (the runner counts them itself, it never asks the library)."""
    return {"op": "set_pos", "seq": seq, "pos": pos}


def positions(seq: int = 0) -> Step:
    return {"op": "positions", "seq": seq}


def stats() -> Step:
    return {"op": "stats"}


def read_kv(il: int, seq: int = 0, p0: int = 0, p1: int = ALL, n_max: int = 4096, heads: int = 0) -> Step:
    """heads: KV heads of the layer, 0 if they are as many as those of layer 0."""
    return {"op": "read_kv", "il": il, "seq": seq, "p0": p0, "p1": p1, "n_max": n_max, "heads": heads}


def contents(seq: int, p0: int = 0, p1: int = ALL, n_max: int = 4096) -> Step:
    """array "contents" [n, 8]: the first four numbers of K (without RoPE) and of V of each cell of a sequence, in layer 0, in order."""
    return {"op": "contents", "seq": seq, "p0": p0, "p1": p1, "n_max": n_max}


def cells(listed: list[list[int]], seq: int = 0) -> Step:
    """Decodes single cells: [pos, y, x, token], or [pos, y, x, seed, index, n] for token `index` of the image of n tokens that this seed gives."""
    return {"op": "cells", "listed": listed, "seq": seq}


def forget(step: Step) -> Step:
    """The same step, whose results are not kept: where the runner's own memory must not grow."""
    return step | {"forget": True}


def breakdown(library: str) -> Step:
    """Bytes of the context by llama.cpp's own account; `library` is tests/native/memory_breakdown.cpp, compiled."""
    return {"op": "breakdown", "library": library}


def rss() -> Step:
    return {"op": "rss"}


def load_capsule(path: Path) -> Step:
    return {"op": "load_capsule", "path": str(path)}


def fingerprint() -> Step:
    return {"op": "fingerprint"}


def limit_memory(extra: int) -> Step:
    """The process may map so many bytes more from here on (Linux), until the case ends."""
    return {"op": "limit_memory", "extra": extra}


def limit_buffers(extra: float = -1, number: int = -1) -> Step:
    """ggml's buffers may take so many bytes more from here on, or only so many may be made (< 0: any). It needs tests/native/few_bytes.cpp, preloaded."""
    return {"op": "limit_buffers", "extra": int(extra), "number": number}


def buffers() -> Step:
    """values["buffers"]: bytes of each buffer that was allocated (> 0) or freed (< 0) since the last time, in order."""
    return {"op": "buffers"}


PARTIAL_ONLY, ON_DEVICE = 1, 2  # LLAMA_STATE_SEQ_FLAGS_*


def state_save(slot: str, seq: int = -1, flags: int = 0) -> Step:
    """seq -1: the state of the whole context. Cases of one run() share their slots. `values["state_size"]` is its size in bytes."""
    return {"op": "state_save", "slot": slot, "seq": seq, "flags": flags}


def state_load(slot: str, seq: int = -1, flags: int = 0, may_fail: bool = False) -> Step:
    """Fails unless all bytes are read; if it may fail, the step's rc is 1 then."""
    return {"op": "state_load", "slot": slot, "seq": seq, "flags": flags, "may_fail": may_fail}


def state_spoil(slot: str, into: str, cut: float = 1.0, flip: float = -1.0) -> Step:
    """Copies a saved state, cut to a part of its bytes, or with one bit flipped at a part of the frame that describes the slots and holds them."""
    return {"op": "state_spoil", "slot": slot, "into": into, "cut": cut, "flip": flip}


def state_version(slot: str, into: str, version: int) -> Step:
    """Copies a saved state, with another version of the frame that describes the slots."""
    return {"op": "state_version", "slot": slot, "into": into, "version": version}


def state_fill(slot: str, into: str, fill: int, hashed: bool) -> Step:
    """Copies the saved state of one sequence, with slots that hold nothing but this byte; hashed: their hashes fit, as those of a program that lies would."""
    return {"op": "state_fill", "slot": slot, "into": into, "fill": fill, "hashed": hashed}


# --- cases and results -----------------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One context and what is done with it."""

    name: str
    model: Path
    steps: list[Step] = field(default_factory=list)
    n_ctx: int = 1024
    n_batch: int = 512
    n_ubatch: int = 512
    n_seq_max: int = 1
    flash_attn: bool = False
    type_k: str = "f16"
    type_v: str = "f16"
    kv_unified: bool = True
    capsule: Path | None = None  # "auto": the built-in one
    n_hot: int = 0
    image_tokens: int = 0
    quality: float = 0.0
    ratio: float = 0.0
    auto_compress: bool = False
    image_attention: int = 0  # 1: auto, 2: measure
    image_causal: bool = True  # False: the tokens of an image see each other, as gemma's do
    reuse: bool = True
    threads: int = 1
    lora: Path | None = None
    cvec: float = 0.0  # strength of a control vector, random, on all layers
    ngl: int = 0  # layers on the devices
    device: str = ""  # --device, "" for all of them
    rpc: str = ""  # --rpc, host:port
    offload_kqv: bool = True
    dump: str = ""  # names of graph tensors to return, a regular expression
    env: dict[str, str] = field(default_factory=dict)  # set around the creation of the context


@dataclass
class StepResult:
    rc: int
    values: dict[str, Any]
    log: list[str]
    arrays: dict[str, np.ndarray]


@dataclass
class Result:
    name: str
    error: str  # why the case stopped, "" if it did not
    log: list[str]  # of the creation of the context
    steps: list[StepResult]
    n_reused: int = 0

    def logits(self, *which: int) -> np.ndarray:
        """Logits of all text steps (or of steps `which`), one row per token."""
        if self.error:
            raise AssertionError(f"{self.name}: {self.error}")
        picked = [self.steps[i] for i in which] if which else self.steps
        return np.concatenate([s.arrays["logits"] for s in picked if "logits" in s.arrays])

    def values(self, key: str) -> list[Any]:
        if self.error:
            raise AssertionError(f"{self.name}: {self.error}")
        return [s.values[key] for s in self.steps if key in s.values]


def nmse(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared error of `a` against the truth `b`, over the variance of `b` in a row."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a - b) ** 2).sum() / ((b - b.mean(-1, keepdims=True)) ** 2).sum())


def lossless_limit(fa: bool, type_k: str = "f16") -> float:
    """The largest NMSE between a lossless capsule and stock, for one case, with the fused attention of the CPU.

    It computes in f32. Stock does so only without flash attention and on an f32 cache, and there they agree; otherwise it rounds queries to f16, or to
    q8_0 with such keys, and probabilities or sums to f16: what is seen is that. (RoPE turns a token by the angle of its block and then by its own: 1e-11.)
    """
    return {"f32": 5e-5 if fa else 2e-11, "f16": 5e-5 if fa else 3e-7, "q8_0": 1e-4}[type_k]


def rounded_limit(fa: bool, type_k: str = "f16") -> float:
    """The same if slots are unpacked or reconstructed into a cache and the usual attention follows.

    Stock itself depends on the order of the cells in its cache: without flash attention it rounds queries and probabilities to f16 (queries to
    q8_0 with such keys), and now and then one of them falls on the other side: two orders differ by up to 1e-8. Where nothing is rounded, in an
    f32 cache, they agree to 1e-12. Flash attention accumulates in f16.
    """
    return 1e-5 if fa else {"f32": 2e-11, "f16": 2e-8, "q8_0": 1e-7}[type_k]


def run(cases: Iterable[Case], lib: Path, env: Mapping[str, str] = {}, timeout: float = 1200) -> dict[str, Result]:
    """Runs cases against the library in folder `lib`."""
    todo = list(cases)
    assert len({c.name for c in todo}) == len(todo), "two cases of the same name"
    out: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        while todo:
            job = folder / "job.json"
            job.write_text(json.dumps([asdict(c) for c in todo], default=str))
            full_env = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_")} | {
                "LLAMA_CPP_LIB_PATH": str(lib), "MTMD_CPP_LIB": str(lib), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **env}
            p = subprocess.run([sys.executable, __file__, str(job), str(folder)], env=full_env, capture_output=True, text=True, timeout=timeout)
            done = 0
            for i, case in enumerate(todo):
                meta = folder / f"{i}.json"
                if not meta.exists():
                    break
                out[case.name] = _read(case.name, meta)
                meta.unlink()
                done += 1
            if done < len(todo):
                if p.returncode >= 0:  # not a signal: the runner itself, or a library that can not be used
                    raise RuntimeError(f"{lib}: {p.stderr[-2000:]}")
                died = todo[done]
                out[died.name] = Result(died.name, f"the process died ({p.returncode}): ...{p.stderr[-1500:]}", [], [])
                done += 1
            todo = todo[done:]
    return out


def _read(name: str, meta: Path) -> Result:
    m = json.loads(meta.read_text())
    with np.load(meta.with_suffix(".npz"), allow_pickle=False) as z:
        arrays = {k: z[k] for k in z.files}
    steps = []
    for i, s in enumerate(m["steps"]):
        mine = {k.split("/", 1)[1]: a for k, a in arrays.items() if k.split("/", 1)[0] == str(i)}
        steps.append(StepResult(s["rc"], s["values"], s["log"], mine))
    return Result(name, m["error"], m["log"], steps, m["n_reused"])


# --- the process -----------------------------------------------------------------------------------------------------------------------------




def _child(job: Path, folder: Path) -> int:
    from llama_process import Process  # the bindings load the library when imported

    process = Process()
    for i, case in enumerate(json.loads(job.read_text())):
        meta, arrays = process.run(case)
        np.savez(folder / f"{i}.npz", **arrays)
        part = folder / f"{i}.json.part"
        part.write_text(json.dumps(meta))
        part.rename(folder / f"{i}.json")
    return 0


if __name__ == "__main__":
    sys.exit(_child(Path(sys.argv[1]), Path(sys.argv[2])))
