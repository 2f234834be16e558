"""Files that broke other readers of GGUF (tests/attacks/): both readers refuse each with one line, and so does a context that gets it by the environment."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from attacks.make import ATTACKS, FILES, MODEL, good_file, make
from llama_runner import Case, Result, compress, image, load_capsule, stats, text

from kvcapsule_gguf.format.capsule import CapsuleError
from kvcapsule_gguf.format.reader import has_capsule
from kvcapsule_gguf.format.tile_capsule import read_tile_capsule


@pytest.fixture(scope="module")
def results(models, patched, tmp_path_factory) -> dict[str, Result]:
    model = models(MODEL)
    good = good_file(model, tmp_path_factory.mktemp("good"))
    cases = [Case(f"load {name}", model, [load_capsule(FILES / f"{name}.gguf")], n_ctx=64) for name in ATTACKS]
    cases += [Case(f"env {name}", model, n_ctx=64, env={"LLAMA_KVCAPSULE": str(FILES / f"{name}.gguf")}) for name in ATTACKS]
    cases.append(Case("good", model, [text(3), image(16), compress(), stats()], n_ctx=64, env={"LLAMA_KVCAPSULE": str(good), "LLAMA_KVCAPSULE_RATIO": "0.8"}))
    return patched(cases)


def refusal(path: Path) -> str:
    with pytest.raises(CapsuleError) as e:
        read_tile_capsule(path)
    return str(e.value)


def test_the_files_are_what_the_script_makes(tmp_path):
    make(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in FILES.iterdir()}
    assert all(p.stat().st_size < 8192 for p in FILES.iterdir())


def test_nothing_else_is_wrong_with_them(results):
    """The same capsule without the hole attaches."""
    assert results["good"].values("stats")[0]["n_cold"] == 16


@pytest.mark.parametrize("name", ATTACKS)
def test_refused(results, name):
    path = FILES / f"{name}.gguf"
    start = time.process_time()
    line = refusal(path)
    has_capsule(path)
    assert time.process_time() - start < 2
    assert len(line) < 400 and len(line.splitlines()) == 1 and line.isprintable()
    loaded = results[f"load {name}"]
    assert not loaded.error and not loaded.steps[0].values["loaded"]
    assert loaded.steps[0].values["last_error"] == line


@pytest.mark.parametrize("name", ATTACKS)
def test_refused_by_the_environment(results, name):
    """The context fails, the process lives, and the log has the line once."""
    result = results[f"env {name}"]
    assert result.error.startswith("context creation failed")
    assert sum(refusal(FILES / f"{name}.gguf") in line for line in result.log) == 1, result.log
