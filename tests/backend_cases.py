"""Lossless capsules with layers on another device: against the same library, device and layers without a capsule. For test_backends.py and scripts/other_backends."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_runner import Case, Result, Step, clear, compress, image, lossless_limit, nmse, positions, rounded_limit, seq_add, seq_cp, seq_rm, state_load, state_save, stats, text

LAYERS = 3
Run = Callable[..., dict[str, Result]]

# batches of 1 and of more than 8 tokens: Vulkan compiles a shader for each size in between, which takes a software driver a minute
CHAT = [text(9), image((8, 8), seed=1), compress(), text(10, seed=1), image((6, 10), seed=2), compress(), text(11, seed=3), text(3, seed=4, one_by_one=True), stats()]
SCRIPTS: dict[str, list[Step]] = {
    "chat": CHAT,
    "growth": [s for i in range(5) for s in (image((8, 12), seed=i), compress(), text(9, seed=i))],
    "sequences": [text(9), image((8, 8), seed=1), compress(), text(9), seq_cp(0, 1), text(10, seed=1), text(10, seed=2, seq=1),
                  seq_rm(0, 0, 3), seq_add(0, 3, -1, -3), text(9, seed=3)],
    "state": [text(9), image((8, 8), seed=1), compress(), text(9), state_save("s"), clear(), text(9, seed=5), image((4, 8), seed=5), compress(),
              clear(), state_load("s"), text(10, seed=2)],
}
FILES: dict[str, dict[str, Any]] = {"axes": {}, "no axes": {"axes": False}}


@dataclass(frozen=True)
class Device:
    """Where the layers go. `exact`: it computes as the CPU does, as the CPU of an RPC server; others round products to f16. `op`: it attends to slots itself, in f32."""

    name: str = ""  # --device
    rpc: str = ""  # --rpc
    exact: bool = True
    op: bool = False


@dataclass(frozen=True)
class Setting:
    """One case: a script of steps on a model, with layers on the device."""

    script: str
    arch: str
    fa: bool  # flash attention
    type_k: str
    file: str  # the capsule's
    ngl: int = 99

    @property
    def name(self) -> str:
        return f"{self.script}, {self.arch}, {'FA' if self.fa else 'no FA'}, {self.type_k}, {self.file}"


@dataclass(frozen=True)
class Row:
    """One comparison: NMSE of the logits, and splits of the graph with the capsule (slots in use) and without."""

    case: str
    ngl: int
    nmse: float
    limit: float
    splits: int
    splits_without: int
    in_slots: int
    error: str = ""

    @property
    def good(self) -> bool:
        return not self.error and self.nmse <= self.limit and self.in_slots > 0


def limit(device: Device, setting: Setting) -> float:
    """As on the CPU, whose own layers attend to slots; a device that rounds to f16 does so once more."""
    type_k, fa = setting.type_k, setting.fa
    if not device.exact:
        return 5e-5
    if device.op:
        return 1.1 * lossless_limit(fa, type_k)
    if type_k == "q8_0" and not fa:
        return 1e-6  # queries are rounded to q8_0: this script gives 2.6e-7 on the CPU too, and 2e-13 with an f32 cache
    return rounded_limit(fa, type_k) if setting.ngl > LAYERS else lossless_limit(fa, type_k)


def settings(full: bool) -> Iterator[Setting]:
    for arch in ("llama", "qwen2vl"):
        for fa in (False, True):
            yield Setting("chat", arch, fa, "f16", "axes")
            yield Setting("chat", arch, fa, "f16", "axes", ngl=2)  # one layer and what comes after the last one
            if full:
                yield Setting("chat", arch, fa, "q8_0", "no axes")
                yield Setting("chat", arch, fa, "f32", "axes")
    for script in ("growth", "sequences", "state"):
        yield Setting(script, "llama", True, "f16", "axes")
        if full:
            yield Setting(script, "llama" if script == "sequences" else "qwen2vl", False, "f32", "no axes", ngl=2)  # llama.cpp shifts no M-RoPE


def compare(run: Run, models: Any, capsules: Any, device: Device, chosen: Iterable[Setting], env: Mapping[str, str] = {}) -> list[Row]:
    """`env` selects a path, for the library with capsules only."""
    ours, truth, by_name = [], [], {}
    for s in chosen:
        model = models(arch=s.arch, n_layer=LAYERS)
        common = {"n_ctx": 1024, "n_seq_max": 2, "flash_attn": s.fa, "type_k": s.type_k, "type_v": s.type_k if s.fa or s.type_k != "q8_0" else "f16",
                  "ngl": s.ngl, "device": device.name, "rpc": device.rpc}
        case = Case(f"{s.name}/{s.ngl}", model, SCRIPTS[s.script], capsule=capsules(model, **FILES[s.file]), **common)
        plain = [positions() if step["op"] in ("compress", "stats") else step for step in case.steps]
        ours.append(replace(case, steps=[*case.steps, stats()]))
        truth.append(replace(case, capsule=None, steps=[*plain, positions()]))
        by_name[case.name] = s
    a, b = run(truth), run(ours, env=env)
    return [_row(s, limit(device, s), a[name], b[name]) for name, s in by_name.items()]


def failed(setting: Setting, most: float, error: str) -> Row:
    return Row(setting.name, setting.ngl, float("nan"), most, 0, 0, 0, error)


def _row(setting: Setting, most: float, truth: Result, ours: Result) -> Row:
    if truth.error or ours.error:
        return failed(setting, most, f"without a capsule: {truth.error}" if truth.error else ours.error)
    return Row(setting.name, setting.ngl, nmse(ours.logits(), truth.logits()), most, _splits(ours), _splits(truth), ours.values("stats")[-1]["n_cold"])


def _splits(result: Result) -> int:
    """Of the last graph that was reserved: with a capsule, after the pools grew for the slots that are in use."""
    lines = [*result.log, *(line for step in result.steps for line in step.log)]
    return max(int(n) for n in re.findall(r"splits = (\d+)", [line for line in lines if "splits" in line][-1]))


@contextmanager
def rpc_server(program: Path, threads: int = 1) -> Iterator[str]:
    """A server on the loopback that offers its CPU -> "127.0.0.1:port"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port), "-t", str(threads), "-d", "CPU"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if server.poll() is not None:
                    raise RuntimeError(f"{program} ended with status {server.returncode}") from None
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()
