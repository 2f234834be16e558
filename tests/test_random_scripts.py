"""Random conversations: images, text, compression, cuts, forks and removals in any order, step by step against the stock library.

The cache is f32, where a lossless capsule and stock agree to 1e-11, so that a single wrong cell would show.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from llama_runner import (
    Case, Step, clear, compress, image, lossless_limit, nmse, positions, seq_cp, seq_keep, seq_rm, set_pos, stats, text, together)

ARCHS = ("llama", "qwen2", "qwen2vl")
SEQS = (0, 1, 2)
STEPS = 22
CASES = [(arch, fa, seed) for arch in ARCHS for fa in (False, True) for seed in range(8 if fa else 30)]


@dataclass
class Author:
    """Writes a script; knows which positions are taken, because text must follow what is left without a gap."""

    mrope: bool
    rng: np.random.Generator
    steps: list[Step] = field(default_factory=list)
    taken: dict[int, set[int]] = field(default_factory=lambda: {s: set() for s in SEQS})
    tokens: int = 0  # an upper bound of the cells in use

    def next(self, seq: int) -> int:
        return max(self.taken[seq], default=-1) + 1

    def add(self, *steps: Step) -> None:
        self.steps += steps

    def some(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high))

    def say(self, seq: int) -> None:
        n = self.some(1, 9)
        self.add(text(n, self.some(0, 1000), seq, one_by_one=bool(self.rng.random() < 0.4)))
        self.taken[seq] |= set(range(self.next(seq), self.next(seq) + n))
        self.tokens += n

    def show(self, seq: int) -> None:
        h, w = self.some(1, 9), self.some(2, 12)
        if self.tokens + h * w > 900:
            return self.say(seq)
        self.add(image((h, w), self.some(0, 1000), seq))
        n = max(h, w) if self.mrope else h * w
        self.taken[seq] |= set(range(self.next(seq), self.next(seq) + n))
        self.tokens += h * w

    def cut(self, seq: int) -> None:
        end = self.next(seq)
        p0, p1 = sorted((self.some(0, end + 1), self.some(0, end + 2)))
        p1 = -1 if self.rng.random() < 0.3 else p1
        self.remove(seq, p0, p1)

    def remove(self, seq: int, p0: int, p1: int) -> None:
        self.add(seq_rm(seq, p0, p1))
        self.taken[seq] = {p for p in self.taken[seq] if p < p0 or (p1 >= 0 and p >= p1)}
        self.add(set_pos(seq, self.next(seq)))

    def fork(self, seq: int) -> None:
        other = (seq + self.some(1, 3)) % 3
        self.remove(other, 0, -1)
        p1 = -1 if self.rng.random() < 0.7 else self.some(1, self.next(seq) + 2)
        self.add(seq_cp(seq, other, 0, p1))
        self.taken[other] = {p for p in self.taken[seq] if p1 < 0 or p < p1}
        self.add(set_pos(other, self.next(other)))

    def squeeze(self, seq: int) -> None:
        if self.rng.random() < 0.6:
            self.add(compress(seq))
        else:
            p0, p1 = sorted((self.some(0, self.next(seq) + 1), self.some(0, self.next(seq) + 5)))
            self.add(compress(seq, p0, max(p1, p0 + 1)))

    def talk(self, seq: int) -> None:
        """One token for every conversation there is, in one batch."""
        seqs = [s for s in SEQS if self.taken[s]]
        if seqs:
            self.add(together({s: self.some(0, 160) for s in seqs}))
            for s in seqs:
                self.taken[s].add(self.next(s))
                self.tokens += 1

    def forget(self, seq: int) -> None:
        if self.rng.random() < 0.5:
            self.add(seq_keep(seq))
            self.taken = {s: self.taken[s] if s == seq else set() for s in SEQS}
        else:
            self.add(clear())
            self.taken = {s: set() for s in SEQS}
            self.tokens = 0
        for s in SEQS:
            self.add(set_pos(s, self.next(s)))

    def write(self) -> list[Step]:
        doings = [(self.say, 6), (self.show, 5), (self.squeeze, 5), (self.cut, 3), (self.fork, 2), (self.talk, 2), (self.forget, 0.4)]
        weights = np.array([w for _, w in doings]) / sum(w for _, w in doings)
        self.say(0)
        self.show(0)
        for _ in range(STEPS):
            doing, _ = doings[int(self.rng.choice(len(doings), p=weights))]
            doing(int(self.rng.choice(3, p=[0.6, 0.25, 0.15])))
        for s in SEQS:
            self.add(positions(s))
            if self.taken[s]:
                self.say(s)
        self.add(stats())
        return self.steps


def spoken(steps: list[Step]) -> list[int]:
    return [i for i, s in enumerate(steps) if s["op"] in ("text", "together")]


@pytest.fixture(scope="module")
def results(models, capsules, stock, patched):
    plain, packed = [], []
    for arch, fa, seed in CASES:
        rng = np.random.default_rng([seed, ARCHS.index(arch), fa])
        steps = Author(arch == "qwen2vl", rng).write()
        name, model = f"{arch}-{fa}-{seed}", models(arch=arch)
        common = {"flash_attn": fa, "type_k": "f32", "type_v": "f32", "n_seq_max": len(SEQS), "n_ubatch": int(rng.choice([16, 64, 512]))}
        capsule = capsules(model, block_size=int(rng.choice([8, 16])))
        auto = bool(rng.random() < 0.4)
        plain.append(Case(name, model, [positions() if s["op"] in ("compress", "stats") else s for s in steps], **common))
        packed.append(Case(name, model, steps, capsule=capsule, auto_compress=auto, **common))
    return {c.name: c.steps for c in packed}, stock(plain), patched(packed)


@pytest.mark.parametrize(("arch", "fa", "seed"), CASES)
def test_like_stock(results, arch, fa, seed):
    scripts, truth, ours = (r[f"{arch}-{fa}-{seed}"] for r in results)
    assert not truth.error, "the script itself is wrong"
    assert not ours.error
    for i in spoken(scripts):
        assert nmse(ours.logits(i), truth.logits(i)) <= 10 * lossless_limit(fa, "f32"), f"step {i}"
    n = len(SEQS)
    ends = [[v for s, v in zip(scripts, r.steps) if s["op"] == "positions"] for r in (truth, ours)]
    assert [v.values["positions"] for v in ends[0][-n:]] == [v.values["positions"] for v in ends[1][-n:]]


def test_they_are_worth_something(results):
    """Most scripts end with images in slots, some with cut ones."""
    seen = [r.values("stats")[-1] for r in results[2].values() if not r.error]
    assert sum(s["n_cold"] > 0 for s in seen) > 0.6 * len(seen)
    assert sum(0 < s["n_cold"] < sum(s["n_slots"]) * s["block_size"] for s in seen) > 0.2 * len(seen)
