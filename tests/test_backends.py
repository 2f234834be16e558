"""Layers on another device: a lossless capsule changes nothing there either.

The device is the CPU of an RPC server on the loopback, if the library has RPC (scripts/setup --backend rpc). scripts/other_backends runs more cases, and Vulkan.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from backend_cases import CHAT, LAYERS, Device, compare, rpc_server, settings
from conftest import ROOT, library
from llama_runner import Case, compress, image, nmse, rounded_limit, state_load, state_save, stats, text

OP = {"LLAMA_KVCAPSULE_PATH": "op", "GGML_RPC_CAPSULE": "1"}


@pytest.fixture(scope="module")
def server():
    folder = library("patched")
    program = next((p for p in (folder / "ggml-rpc-server", folder / "bin" / "ggml-rpc-server") if p.is_file()), None)
    if program is None:
        pytest.skip(f"no ggml-rpc-server in {folder}: scripts/setup --backend rpc builds it")
    with rpc_server(program) as address:
        yield address


def test_rpc(models, capsules, patched, server):
    """Slots stay in host memory: right, but with more splits of the graph."""
    rows = compare(patched, models, capsules, Device(rpc=server), settings(full=True))
    assert not [row for row in rows if not row.good]
    assert all(row.splits > row.splits_without for row in rows)


def test_the_op_on_a_device_with_memory_of_its_own(models, capsules, patched, server):
    """GGML_OP_CAPSULE of the server, which is of the same build: slots are there, all layers or some, and the graph has no more splits."""
    rows = compare(patched, models, capsules, Device(rpc=server, op=True), settings(full=True), env=OP)
    assert not [row for row in rows if not row.good]
    assert all(row.splits == row.splits_without for row in rows)


def test_slots_do_not_depend_on_where_the_op_runs(models, patched, server):
    """A state that was saved there is read in host memory, and says the same."""
    model = models(arch="qwen2vl", n_layer=LAYERS)
    steps = [text(9), image((12, 9), seed=1), compress(), state_save("s", 0), text(3)]
    there = Case("there", model, steps, capsule="auto", ngl=99, rpc=server)
    here = Case("here", model, [text(3), state_load("s", 0), text(3), stats()], capsule="auto")
    done = patched([there, here], env=OP)
    assert done["here"].values("stats")[0]["n_cold"] == 108
    assert nmse(done["here"].logits(2), done["there"].logits(4)) <= 1e-3


def test_cache_in_host_memory(models, capsules, patched, server):
    """-nkvo: the device claims to support the ops of the CPU, they must not get there."""
    model = models(arch="llama", n_layer=LAYERS)
    common = {"ngl": 99, "rpc": server, "offload_kqv": False, "flash_attn": True}
    truth = patched([Case("a", model, [s for s in CHAT if s["op"] != "compress"], **common)])["a"]
    ours = patched([Case("a", model, CHAT, capsule=capsules(model), **common)])["a"]
    assert nmse(ours.logits(), truth.logits()) <= 5e-5


@pytest.mark.parametrize("fa", [False, True])
def test_slots_on_the_host_of_the_cpu(models, capsules, patched, fa):
    """The same way without a device."""
    model = models(arch="qwen2vl", n_layer=LAYERS)
    truth = patched([Case("a", model, [s for s in CHAT if s["op"] != "compress"], flash_attn=fa)])["a"]
    ours = patched([Case("a", model, CHAT, capsule=capsules(model), flash_attn=fa)], env={"LLAMA_KVCAPSULE_PATH": "host"})["a"]
    assert nmse(ours.logits(), truth.logits()) <= rounded_limit(fa)


@pytest.mark.parametrize(("flags", "line"), [(["--device", "Abacus"], "no device Abacus"), (["--rpc", "nowhere"], "expected host:port"), (["--rpc", "127.0.0.1:1"], "")])
def test_mistakes_are_one_line(flags, line):
    """Also where ggml itself would abort; a library without RPC says so."""
    model = next((ROOT / "kvcapsule_gguf" / "demo").glob("kvdemo-*.gguf"))
    env = os.environ | {"KVCAPSULE_LIB": str(library("patched"))}
    done = subprocess.run([sys.executable, "-m", "kvcapsule_gguf.chat.cli", str(model), "-p", "x", *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("kvcapsule-chat: error:")
    assert line in done.stderr or "without RPC" in done.stderr


def test_scripts_other_backends_changes_its_page_only_when_asked(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from other_backends_steps import page, run

    text = page.PAGE.read_text()
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.PAGE.write_text(text)
    monkeypatch.setattr(run, "_vulkan", lambda quick: [run.Group(run.Device(), [])])
    monkeypatch.setattr(run, "_title", lambda *_: "a run that measured nothing")
    assert run.run("vulkan", tmp_path, quick=True, with_demo=False, write=False) == 0 and page.PAGE.read_text() == text
    assert run.run("vulkan", tmp_path, quick=True, with_demo=False, write=True) == 0 and "a run that measured nothing" in page.PAGE.read_text()
