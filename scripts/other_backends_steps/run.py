"""Build, compare, ask, print, and write the page where that is wanted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend_cases import Device, Row, Setting, compare, failed, limit, rpc_server, settings
from setup_steps import native
from setup_steps.common import CACHE, LLAMA, ROOT, run as run_logged

from . import page
from .demo import ask

RPC_SERVER = native.RPC_SERVER + (".exe" if os.name == "nt" else "")
TIMEOUT = 1800  # seconds, of one process


@dataclass(frozen=True)
class Group:
    """Cases that are a table of their own; `env` is set for both libraries, with and without a capsule."""

    device: Device
    settings: list[Setting]
    sentence: str = ""
    env: dict[str, str] = field(default_factory=dict)


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
    begin = time.monotonic()
    with ExitStack() as stack:
        if backend == "rpc":
            program = next((p for p in (lib / RPC_SERVER, lib / "bin" / RPC_SERVER) if p.is_file()), None)
            if program is None:
                raise RuntimeError(f"no {RPC_SERVER} in {lib}")
            groups = _rpc(stack.enter_context(rpc_server(program)), quick)
        else:
            os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0")
            groups = _vulkan(quick)
        title = _title(backend, lib, groups[0].device)
        say(f"{title}: lossless capsules")
        tables = [(group.sentence, list(lossless(lib, group))) for group in groups]
        answers = []
        if with_demo:
            say(f"{title}: the demo")
            for a in ask(lib, groups[0].device, TIMEOUT):
                say(f"--capsule {a.capsule} -ngl {a.ngl}: {', '.join(a.texts) or a.error}")
                answers.append(a)
    text = page.section(backend, title, tables, answers)
    print(text)
    if write:
        page.replace(backend, text)
    say(f"{(time.monotonic() - begin) / 60:.0f} minutes")
    answered = all(a.texts and a.texts == answers[0].texts for a in answers)
    return 0 if answered and all(row.good for _, rows in tables for row in rows) else 1


def _rpc(address: str, quick: bool) -> list[Group]:
    return [Group(Device(rpc=address), list(settings(full=not quick)))]


def _vulkan(quick: bool) -> list[Group]:
    chats = [Setting("chat", "llama", fa, *kind) for fa in (False, True) for kind in (("f16", "axes"), ("f16", "no axes"), ("q8_0", "no axes"))]
    return [
        Group(Device(name="Vulkan0", exact=False), list(settings(full=not quick))),
        Group(
            Device(name="Vulkan0"),
            chats[: 1 if quick else None],
            "With `GGML_VK_DISABLE_F16=1` the device multiplies in f32 and has to keep to the limits of the CPU:",
            {"GGML_VK_DISABLE_F16": "1"},
        ),
    ]


def lossless(lib: Path, group: Group) -> Iterator[Row]:
    """Each case in processes of its own: one that dies or hangs is a row, and the others follow."""
    from llama_runner import run as run_cases
    from make_capsule import random_capsule
    from tiny_gguf import ModelStore

    with tempfile.TemporaryDirectory(prefix="kvcapsule-") as folder:
        path = Path(folder)
        models = ModelStore(path)

        def capsule(model: Path, **kind: Any) -> Path:
            out = path / f"{model.stem}-{'-'.join(f'{k}={v}' for k, v in kind.items())}.gguf"
            if not out.exists():
                random_capsule(model, out, **kind)
            return out

        for i, setting in enumerate(group.settings, 1):
            begin = time.monotonic()
            try:
                row = compare(lambda cases, env={}: run_cases(cases, lib, env=group.env | dict(env), timeout=TIMEOUT), models, capsule, group.device, [setting])[0]
            except subprocess.TimeoutExpired:
                row = failed(setting, limit(group.device, setting), f"no end in {TIMEOUT} s")
            say(f"{i} of {len(group.settings)}, {row.case}, -ngl {row.ngl}: {page.verdict(row)}, {time.monotonic() - begin:.0f} s")
            yield row


def _title(backend: str, lib: Path, device: Device) -> str:
    if backend == "rpc":
        return "RPC: a server on the loopback, which computes on its CPU"
    code = "import sys; from pathlib import Path; from kvcapsule_gguf.native.devices import Devices; print([d.description for d in Devices(Path(sys.argv[1])).choose(sys.argv[2])][0])"
    found = subprocess.run([sys.executable, "-c", code, str(lib), device.name], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(found.stderr.strip().splitlines()[-1])
    name = found.stdout.strip()
    return ", ".join(part for part in (f"Vulkan: {name}", _driver(name)) if part)


def _driver(device: str) -> str:
    """The version of a Vulkan device's driver, "" without vulkaninfo."""
    try:
        text = subprocess.run(["vulkaninfo", "--summary"], capture_output=True, text=True).stdout
    except OSError:
        return ""
    found = re.search(rf"deviceName\s*= {re.escape(device)}\n(?:.*\n)*?\s*driverInfo\s*= ([^(\n]*)", text)
    return found[1].strip() if found else ""


def say(text: str) -> None:
    print(f"other_backends: {text}", file=sys.stderr, flush=True)
