"""Thousands of random operations against a model of the cache, the stock library and fresh evaluations (scripts/random_operations does more)."""

from __future__ import annotations

import numpy as np
import pytest
from cache_model import CacheModel
from conftest import library
from random_operations import HOT, Script, Setting, random_script, random_setting
from random_runs import Runner, parse_repro, repro

SCRIPTS, LENGTH = 60, 40


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> Runner:
    return Runner(tmp_path_factory.mktemp("random"), library("patched"), library("stock"))


def test_thousands_of_operations(runner):
    rngs = [np.random.default_rng([7, i]) for i in range(SCRIPTS)]
    scripts = [Script(str(i), random_setting(rng), random_script(rng, LENGTH)) for i, rng in enumerate(rngs)]
    failed = runner.problems(scripts)
    if failed:
        name = min(failed, key=int)
        operations, problem = runner.shrink(scripts[int(name)].setting, scripts[int(name)].operations)
        pytest.fail(f"{problem}\nscripts/random_operations --replay '{repro(scripts[int(name)].setting, operations)}'")
    # they are worth something: most end with images in slots, many with cut ones and with several sequences
    ends = [s.model.counts() for s in scripts]
    assert sum(e["n_cold"] > 0 for e in ends) > len(scripts) / 3
    assert sum(s.model.cut() for s in scripts) > len(scripts) / 10
    assert sum(len(s.fresh) for s in scripts) > len(scripts)
    # and in some more text and images are left than the hot cache begins with
    assert sum(e["n_hot_used"] > HOT for e in ends) > 2


def test_a_wrong_model_is_noticed_and_made_short(runner, monkeypatch):
    """The oracle itself: a model in which forks forget an image fails, and shrinks to an image and a fork."""
    setting = Setting("llama", 1, False, False, 2, 512)
    operations = [("say", 0, 1, 2, 3), ("show", 0, 5, 3, 4), ("compress", 0, 0, 0, 1), ("save", 0, 0, 0, 1), ("say", 0, 9, 4, 1), ("fork", 0, 0, 0, 1),
                  ("say", 1, 3, 2, 1), ("together", 0, 5, 0, 0), ("cut_end", 0, 3, 1, 1), ("compress", 1, 0, 0, 1)]
    assert not runner.problems([Script("s", setting, operations)])
    right = CacheModel.cp

    def wrong(self: CacheModel, src: int, dst: int, p1: int) -> None:
        right(self, src, dst, p1)
        for c in self.of(dst):
            if c.token.vision:
                c.seqs.discard(dst)

    monkeypatch.setattr(CacheModel, "cp", wrong)
    short, problem = runner.shrink(setting, operations)
    assert problem and [name for name, *_ in short] == ["show", "fork"]


def test_a_repro_is_what_it_was():
    rng = np.random.default_rng(5)
    setting, operations = random_setting(rng), random_script(rng, 10)
    assert parse_repro(repro(setting, operations)) == (setting, operations)
