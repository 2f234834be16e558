"""kvcapsule-eval: its arithmetic, and that it measures what it says, on a tiny model in the real library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, library
from PIL import Image

from kvcapsule_gguf.eval.intervals import bootstrap, wilson
from kvcapsule_gguf.eval.run import score
from kvcapsule_gguf.eval.settings import dropped, rivals
from kvcapsule_gguf.eval.suites import SUITES, mixed_sizes, scenes, strange
from kvcapsule_gguf.scenes import size_of


def test_wilson():
    low, high = wilson(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20)[0] == 0 and round(wilson(0, 20)[1], 4) == 0.1611


def test_bootstrap_resamples_pictures():
    groups = np.repeat(np.arange(50), 8)
    rng = np.random.default_rng(0)
    same = np.repeat(rng.standard_normal(50), 8)  # 400 values, but only 50 different ones
    low, high = bootstrap(same, groups)
    assert low < same.mean() < high
    assert 0.8 < (high - low) / (2 * 1.96 * same.std() / np.sqrt(50)) < 1.2
    positive = np.exp(same)
    assert bootstrap(2 * positive, groups, positive) == pytest.approx((2, 2))  # question by question


@pytest.mark.parametrize("n", [16, 576, 7])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.6, 0.875])
def test_dropping_is_even(n, share):
    gone = {i for a, b in dropped(n, share) for i in range(a, b)}
    kept = np.array([i for i in range(n) if i not in gone])
    assert len(kept) == max(1, round(n * (1 - share))) and kept[-1] == n - 1
    assert np.ptp(np.diff(kept)) <= 1 if len(kept) > 1 else True


def test_score():
    p, q = np.log(np.array([[0.5, 0.25, 0.25]])), np.log(np.array([[0.25, 0.5, 0.25]]))
    kld, exact, agree = score(q + 7, p - 3, [1])
    assert kld == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2)) and exact and agree == 0


def test_rivals():
    assert [(s.cache, s.drop, s.vision) for s in rivals(["f16", "q4_0", "drop0.6", "q4_0-vision"])] == [
        ("f16", 0, ""), ("q4_0", 0, ""), ("f16", 0.6, ""), ("f16", 0, "q4_0")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="q7_0"):
        rivals(["q7_0"])


SEQUENTIAL = """
import sys
sys.path[:0] = [{root!r}]
from pathlib import Path
import numpy as np
from kvcapsule_gguf.eval.prompts import Prompts
from kvcapsule_gguf.eval.settings import Setting
from kvcapsule_gguf.eval.suites import scenes
from kvcapsule_gguf.eval.cache import Cache
from kvcapsule_gguf.eval.vlm import Vlm

vlm = Vlm(Path({model!r}), Path({mmproj!r}), 1)
prompts, (sample,) = Prompts(vlm), list(scenes(6, 6))
cache = Cache(vlm, Setting("f16"), 2048, 8, flash_attn=False)
picture = vlm.read(prompts.before(), *sample.pictures)
cache.show(picture)
asked = [prompts.forced(q.prompt, q.answer) for q in sample.questions]
pairs = [(f.tokens, f.n_answer) for f in asked]
together = cache.ask(pairs)
one_by_one = [cache.ask([p])[0] for p in pairs]
assert all(((a - b) ** 2).mean() < 1e-5 * b.var() for a, b in zip(together, one_by_one)), "together"  # f16 rounds

# greedy decoding from the cache: where it writes the answer, all of the forced first choices are right, and the other way round
start = cache.n_past
for (tokens, n), logits in zip(pairs, together):
    written, question = [], tokens[:-n]
    rows = [(t, start + i, 0, i == len(question) - 1) for i, t in enumerate(question)]
    for i in range(n):
        written.append(int(cache._decode(rows)[-1].argmax()))
        rows = [(written[-1], start + len(question) + i, 0, True)]
    cache.llama.llama_memory_seq_rm(cache.memory, 0, start, -1)
    wrong = np.flatnonzero(logits.argmax(-1) != written)
    forced = np.flatnonzero(np.array(written) != tokens[-n:])
    assert not len(wrong) or (len(forced) and wrong[0] > forced[0]), "greedy"  # they differ only after a wrong token
print("fine")
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Path]:
    from chat_model import write_mmproj, write_model

    folder = tmp_path_factory.mktemp("eval")
    return write_model(folder / "tiny.gguf"), write_mmproj(folder / "mmproj-tiny.gguf")


def run(kind: str, *arguments: str) -> str:
    env = os.environ | {"KVCAPSULE_LIB": str(library(kind)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_questions_do_not_disturb_each_other(tiny):
    script = SEQUENTIAL.format(root=str(ROOT), model=str(tiny[0]), mmproj=str(tiny[1]))
    assert run("patched", "-c", script).strip() == "fine"


def test_the_table(tiny, tmp_path):
    out = run("patched", "-m", "kvcapsule_gguf.eval", str(tiny[0]), "-n", "20", "-c", "2048", "-t", "1", "--report", str(tmp_path), "--json")
    data = json.loads(out)
    rows = {r["setting"]: r for r in data["settings"]}
    assert list(rows) == ["f16", "q8_0", "q4_0", "drop0.6"] and data["questions"] == 20
    assert rows["f16"]["kld"] == 0 and rows["f16"]["kv_ratio"] == 0
    assert 0 < rows["q8_0"]["kld"] < rows["q4_0"]["kld"] < rows["drop0.6"]["kld"]
    assert rows["q8_0"]["kv_ratio"] == pytest.approx(1 - 8.5 / 16, abs=1e-3)
    assert rows["drop0.6"]["kv_ratio"] == pytest.approx(0.6, abs=0.05)
    assert json.loads((tmp_path / "eval.json").read_text()) == data
    assert (tmp_path / "eval.md").read_text().count("| q4_0 |") == 2  # all questions, and by task
    assert Image.open(tmp_path / "eval.png").size[0] > 500
    assert sum(t["questions"] for t in rows["q4_0"]["tasks"].values()) == 20 and data["answer_tokens"] > 20


def without_time(setting: dict) -> dict:
    return {k: v for k, v in setting.items() if k != "seconds"}


def test_an_interrupted_run_goes_on(tiny, tmp_path):
    """A journal with two of three pictures and half a line gives the numbers of a whole run, with more settings too; one of another run is refused."""
    command = ["-m", "kvcapsule_gguf.eval", str(tiny[0]), "-n", "20", "-c", "2048", "-t", "1", "--json", "--against", "q4_0", "--report", str(tmp_path)]
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from kvcapsule_gguf.eval import cli
def stop(self, result):
    if len(set(result.picture)) == 2:
        raise KeyboardInterrupt
cli.Progress.__call__ = stop
sys.exit(cli.main({command[2:]!r}) - 130)
"""
    assert run("patched", "-c", script) == ""
    journal = tmp_path / "eval.jsonl"
    assert len(journal.read_text().splitlines()) == 2
    with journal.open("a") as f:
        f.write('{"picture": "2", "ta')
    resumed = json.loads(run("patched", *command))
    assert len(journal.read_text().splitlines()) == 4  # with the half one
    more = json.loads(run("patched", *(x.replace("q4_0", "q8_0,q4_0") for x in command)))
    assert len(journal.read_text().splitlines()) == 7 and [s["setting"] for s in more["settings"]] == ["f16", "q8_0", "q4_0"]
    journal.unlink()
    whole = json.loads(run("patched", *(x.replace("q4_0", "q8_0,q4_0") for x in command)))
    assert [without_time(s) for s in more["settings"]] == [without_time(s) for s in whole["settings"]]
    whole["settings"].pop(1)
    for a, b in zip(resumed["settings"], whole["settings"]):
        assert without_time(a) == without_time(b)
    journal.write_text('{"run": []}')
    env = os.environ | {"KVCAPSULE_LIB": str(library("patched"))}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "another run" in done.stderr


def test_vision_cells_alone(tiny):
    """Quantizing the vision cells alone costs less than quantizing all, and q8_0 less than q4_0; the bytes are those of the types."""
    out = run("patched", "-m", "kvcapsule_gguf.eval", str(tiny[0]), "-n", "20", "-c", "2048", "-t", "1", "--json", "--against", "q4_0,q4_0-vision,q8_0-vision")
    rows = {r["setting"]: r for r in json.loads(out)["settings"]}
    assert 0 < rows["q8_0-vision"]["kld"] < rows["q4_0-vision"]["kld"] < rows["q4_0"]["kld"]
    assert rows["q4_0-vision"]["kv_ratio"] == pytest.approx(1 - 4.5 / 16, abs=1e-3)


def test_the_strange_suite_asks_the_same_of_other_pictures():
    pairs = list(zip(scenes(24, 4), strange(24, 4)))
    for a, b in pairs:
        assert a.questions == b.questions and b.pictures[0].size == (336, 336)
        assert np.abs(np.asarray(a.pictures[0], float) - np.asarray(b.pictures[0], float)).mean() > 15
    assert np.array_equal(np.asarray(pairs[0][1].pictures[0]), np.asarray(next(strange(4, 4)).pictures[0]))


def test_mixed_sizes():
    """Every suite has its questions about pictures of the sizes that go with the seeds."""
    for name, suite in SUITES.items():
        plain, mixed = list(suite(12, 4)), list(suite(12, 4, mixed_sizes(name)))
        assert [s.questions for s in plain] == [s.questions for s in mixed]
        assert {p.size for s in plain for p in s.pictures} == {(336, 336)}
        seeds = [int(word) for s in mixed for word in s.name.split(" and ")]
        assert [p.size for s in mixed for p in s.pictures] == [size_of(seed) for seed in seeds]


def test_two_pictures(tiny):
    """Both are in the cache, each compressed for itself."""
    out = run("patched", "-m", "kvcapsule_gguf.eval", str(tiny[0]), "--suite", "pairs", "-n", "9", "-c", "4096", "-t", "1", "--json", "--against", "q8_0-vision")
    one = run("patched", "-m", "kvcapsule_gguf.eval", str(tiny[0]), "--suite", "scenes", "-n", "5", "--per-picture", "5", "-c", "4096", "-t", "1", "--json", "--against", "q8_0-vision")
    two, one = json.loads(out), json.loads(one)
    assert (two["questions"], two["pictures"]) == (9, 2) and two["settings"][0]["tasks"].keys() == {"compare"}
    assert two["vision_tokens"] == [2 * n for n in one["vision_tokens"]]
    assert two["settings"][1]["slots"]["economy"] == 4 * one["settings"][1]["slots"]["economy"]


def test_pictures_of_ones_own(tiny, tmp_path):
    """Without answers the model's own count: with the f16 cache it writes them again."""
    for i in range(2):
        Image.effect_noise((64, 48), 50 + 40 * i).convert("RGB").save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")  # skipped
    out = run("patched", "-m", "kvcapsule_gguf.eval", str(tiny[0]), "--images", str(tmp_path), "-c", "2048", "-t", "1", "-fa", "off",
              "--against", "f16", "--json")
    data = json.loads(out)
    assert (data["questions"], data["pictures"]) == (4, 2)
    assert data["settings"][0]["exact_match"] == 1


def test_a_lossless_capsule_changes_nothing(tiny, tmp_path):
    from make_capsule import random_capsule

    folder = library("patched")
    assert folder
    good = random_capsule(tiny[0], tmp_path / "kvcapsule-good.gguf", block_size=16, lossless=True)
    poor = random_capsule(tiny[0], tmp_path / "kvcapsule-poor.gguf", block_size=16, lossless=False)
    out = run("patched", "-m", "kvcapsule_gguf.eval", str(tiny[0]), "-n", "20", "-c", "2048", "-t", "1", "--json", "--against", "q8_0",
              "--capsule", str(good), "--capsule", str(poor))
    f16, q8, lossless, lossy = json.loads(out)["settings"]
    assert lossless["kld"] < 1e-6 < lossy["kld"]
    assert lossless["kv_ratio"] == pytest.approx(-1, abs=1e-3) and 0.5 < lossy["kv_ratio"] < 0.9
    assert lossy["slots"]["economy"] > 0
