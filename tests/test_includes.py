"""What includes what in the native code: downward only, and llama.cpp knows one header of ours."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

FILES = ROOT / "patches" / "files"
CAPSULE = FILES / "src" / "capsule"
LAYERS = ["util", "format", "model", "store", "compress", "graph", "api"]  # from below
# what a layer sees of llama.cpp; from `store` on it may be anything
SEEN = {"util": "ggml|llama-impl", "format": "ggml|gguf|llama-impl"}
INCLUDE = re.compile(r'^#include "([^"]+)"', re.M)
SOURCES = sorted(path for path in CAPSULE.rglob("*") if path.suffix in (".h", ".cpp"))


def includes(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text())


def test_the_folders_are_the_layers():
    assert sorted(path.name for path in CAPSULE.iterdir()) == sorted([*LAYERS, "hooks.h"])
    assert not [path for path in FILES.joinpath("src").iterdir() if path != CAPSULE]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CAPSULE)))
def test_a_layer_includes_those_below_it(path):
    mine = path.relative_to(CAPSULE).parts[0]
    below = LAYERS[: LAYERS.index(mine) + 1] if mine in LAYERS else []
    for name in includes(path):
        if name.startswith("capsule/"):
            assert name == "capsule/hooks.h" or name.split("/")[1] in below, f"{mine} includes {name}"
        elif not name.startswith("../ggml/src/ggml-capsule/"):
            assert re.match(SEEN.get(mine, ""), name), f"{mine} includes {name}"


def test_what_all_may_include_includes_nothing_of_ours():
    assert not [name for name in includes(CAPSULE / "hooks.h") if "capsule" in name]


def test_no_include_leads_back():
    graph = {str(path.relative_to(FILES / "src")): {name for name in includes(path) if name.startswith("capsule/")} for path in SOURCES}
    assert len(graph) > 30 and graph["capsule/graph/graph.h"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_llama_cpp_includes_one_header():
    """And ggml's own files those that belong to the backend."""
    added = [line for path in sorted((ROOT / "patches").glob("*.patch")) for line in path.read_text().splitlines() if line.startswith("+#")]
    names = {name for line in added for name in re.findall(r'(?:include|import) "([^"]+)"', line)}
    assert {name for name in names if name.startswith("capsule/") or name.startswith("llama-")} == {"capsule/hooks.h"}


def test_the_arithmetic_needs_nothing_of_ggml():
    """ggml-capsule/ is compiled for the tests and the bench without anything else."""
    folder = FILES / "ggml" / "src" / "ggml-capsule"
    own = {path.name for path in folder.iterdir()}
    assert len(own) > 10
    for path in folder.iterdir():
        assert set(includes(path)) <= own, path.name
