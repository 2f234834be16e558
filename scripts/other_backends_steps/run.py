"""Build, compare, ask, and write the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from backend_cases import Device, Row, compare, rpc_server
from setup_steps import native
from setup_steps.common import CACHE, LLAMA, ROOT, run as run_logged

PAGE = ROOT / "docs" / "results" / "other-backends.md"
DEMO = ROOT / "kvcapsule_gguf" / "demo"
QUESTIONS = ("What is at the top right?", "Where is the circle?", "What does the word say?")
RPC_SERVER = native.RPC_SERVER + (".exe" if os.name == "nt" else "")


def build(backend: str, defines: list[str], jobs: int) -> Path:
    """The patched llama.cpp with this backend -> the folder of its libraries. Raises RuntimeError."""
    source, folder = LLAMA / "patched" / "source", CACHE / "other-backends" / backend
    if not source.is_dir():
        raise RuntimeError("there is no patched llama.cpp: run scripts/setup first")
    options = native.OPTIONS | native.BACKENDS[backend] | {"LLAMA_BUILD_MTMD": "ON", "LLAMA_BUILD_SERVER": "OFF", "LLAMA_BUILD_TESTS": "OFF"}
    tools = "ON" if backend == "rpc" else "OFF"
    options |= {"LLAMA_BUILD_COMMON": tools, "LLAMA_BUILD_TOOLS": tools}
    say(f"building llama.cpp with {backend}; the first time this takes minutes (log: {folder / 'build.log'})")
    definitions = [f"-D{name}={value}" for name, value in options.items()] + [f"-D{text}" for text in defines]
    try:
        run_logged("configuring llama.cpp", ["cmake", "-S", source, "-B", folder / "build", *definitions], folder / "configure.log")
        targets = ["llama", "mtmd", *([native.RPC_SERVER] if backend == "rpc" else [])]
        run_logged("building llama.cpp", ["cmake", "--build", folder / "build", "-j", str(jobs), "--target", *targets], folder / "build.log")
    except Exception as error:
        raise RuntimeError(str(error)) from None
    return folder / "build" / "bin"


def run(backend: str, lib: Path, quick: bool, with_demo: bool, write: bool) -> int:
    with ExitStack() as stack:
        if backend == "rpc":
            program = next((p for p in (lib / RPC_SERVER, lib / "bin" / RPC_SERVER) if p.is_file()), None)
            if program is None:
                raise RuntimeError(f"no {RPC_SERVER} in {lib}")
            device = Device(rpc=stack.enter_context(rpc_server(program)))
        else:
            os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0")
            device = Device(name="Vulkan0", exact=False)
        title = _title(backend, lib, device)
        say(f"{title}: lossless capsules")
        rows = lossless(lib, device, quick)
        answers = []
        if with_demo:
            say(f"{title}: the demo")
            answers = demo(lib, device)
    text = page(backend, title, rows, answers)
    print(text)
    if write:
        _replace(backend, text)
    same = all(a["answers"] == answers[0]["answers"] for a in answers)
    return 0 if same and all(row.good for row in rows) else 1


def lossless(lib: Path, device: Device, quick: bool) -> list[Row]:
    from llama_runner import run as run_cases
    from make_capsule import random_capsule
    from tiny_gguf import ModelStore

    with tempfile.TemporaryDirectory(prefix="kvcapsule-") as folder:
        path = Path(folder)

        def capsule(model: Path, **kind: Any) -> Path:
            out = path / f"{model.stem}-{'-'.join(f'{k}={v}' for k, v in kind.items())}.gguf"
            if not out.exists():
                random_capsule(model, out, **kind)
            return out

        return compare(lambda cases, env={}: run_cases(cases, lib, env=env, timeout=7200), ModelStore(path), capsule, device, full=not quick)


def demo(lib: Path, device: Device) -> list[dict[str, Any]]:
    """The same questions with the capsule off and on, all layers on the device, then half of them."""
    model = next(p for p in sorted(DEMO.glob("kvdemo-*.gguf")))
    where = [*(["--device", device.name] if device.name else []), *(["--rpc", device.rpc] if device.rpc else [])]
    out = []
    for capsule, ngl in (("off", 99), ("auto", 99), ("auto", 4)):
        command = [sys.executable, "-m", "kvcapsule_gguf.chat.cli", model, "--capsule", capsule, "-ngl", str(ngl), *where]
        command += ["--temp", "0", "-n", "16", "-c", "2048", "--json"]
        lines = "".join(f"{line}\n" for line in (f"/image {DEMO / 'scene-1.jpg'}", *QUESTIONS))
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_ARG_", "LLAMA_KVCAPSULE"))} | {"KVCAPSULE_LIB": str(lib)}
        done = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, input=lines, capture_output=True, text=True, timeout=7200)
        reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if len(reports) != len(QUESTIONS):
            raise RuntimeError(f"the demo with --capsule {capsule} -ngl {ngl} ended with status {done.returncode}: {done.stderr[-300:]}")
        last = reports[-1]
        out.append({"capsule": capsule, "ngl": ngl, "answers": [r["answer"].strip() for r in reports], "f16": last["kv_bytes_f16_equivalent"], "now": last["kv_bytes"]})
    return out


def page(backend: str, title: str, rows: list[Row], answers: list[dict[str, Any]]) -> str:
    lines = [f"## {title}", "", f"`scripts/other_backends {backend}` printed this. Splits: parts of the graph that run on one device, with slots in use / without a capsule.", ""]
    lines += ["| case | -ngl | NMSE of the logits | at most | splits | tokens in slots | |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r.case} | {r.ngl} | {r.nmse:.1e} | {r.limit:.0e} | {r.splits} / {r.splits_without} | {r.in_slots} | {'ok' if r.good else r.error[:80] or 'DIFFERS'} |")
    if not answers:
        return "\n".join(lines) + "\n"
    lines += ["", f"The demo model: {', '.join(QUESTIONS)}", "", "| capsule | -ngl | answers | KV of the picture, MiB | smaller |", "|---|---|---|---|---|"]
    for a in answers:
        lines.append(f"| {a['capsule']} | {a['ngl']} | {', '.join(a['answers'])} | {a['now'] / 2**20:.2f} | {a['f16'] / a['now']:.1f}x |")
    return "\n".join(lines) + "\n"


def _title(backend: str, lib: Path, device: Device) -> str:
    if backend == "rpc":
        return "RPC: a server on the loopback, which computes on its CPU"
    code = "import sys; from pathlib import Path; from kvcapsule_gguf.native.devices import Devices; print([d.description for d in Devices(Path(sys.argv[1])).choose(sys.argv[2])][0])"
    found = subprocess.run([sys.executable, "-c", code, str(lib), device.name], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(found.stderr.strip().splitlines()[-1])
    return f"Vulkan: {found.stdout.strip()}"


def _replace(backend: str, text: str) -> None:
    """This backend's section of the page; the other one stays."""
    begin, end = f"<!-- {backend}, begin -->", f"<!-- {backend}, end -->"
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(begin) + len(begin)] + f"\n{text}" + page[page.index(end) :])


def say(text: str) -> None:
    print(f"other_backends: {text}", file=sys.stderr, flush=True)
