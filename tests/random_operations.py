"""Random operations on a cache with a lossless capsule, against three truths: a plain model of the cache, the stock library doing the same, and the stock library
evaluating afresh what is left of each sequence at the end.

An operation is (name, sequence, a, b, c) with random numbers a, b and c, whose meaning depends on what is there: any part of a script is a script too, which is
what lets a failing one shrink.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cache_model import END, CacheModel, Token
from cache_truth import afresh, first_layer
from llama_runner import (
    Case,
    Result,
    Step,
    clear,
    compress,
    contents,
    image,
    lossless_limit,
    nmse,
    positions,
    seq_add,
    seq_cp,
    seq_keep,
    seq_rm,
    set_pos,
    state_load,
    state_save,
    state_spoil,
    stats,
    text,
    together,
)
from tiny_gguf import TinyModel

Operation = tuple[str, int, int, int, int]
VOCAB, TOKENS_MAX, CELLS, HOT = 32, 600, 1024, 256  # the hot cache grows on the way
WEIGHTS = {"say": 6, "tell": 4, "show": 6, "compress": 6, "cut": 3, "cut_end": 2, "cut_slot": 2, "fork": 2, "together": 2, "shift": 2, "save": 1.5, "restore": 2, "spoil": 0.5,
           "keep": 0.3, "clear": 0.2}
TINY = TinyModel(n_head=2, n_head_kv=1, head=32, n_ff=32, n_vocab=VOCAB)


@dataclass(frozen=True)
class Setting:
    """A context."""

    arch: str
    n_layer: int  # with one layer a cell depends on nothing but its token and its position
    flash_attn: bool
    auto: bool
    n_seq: int
    n_ubatch: int

    @property
    def model(self) -> TinyModel:
        return TINY.but(arch=self.arch, n_layer=self.n_layer)


def random_setting(rng: np.random.Generator) -> Setting:
    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    return Setting(pick("llama", "qwen2", "qwen2vl"), pick(1, 2), pick(False, False, False, True), pick(False, False, True), pick(1, 2, 3, 4),
                   pick(16, 64, 512))


def random_script(rng: np.random.Generator, n: int) -> list[Operation]:
    names = list(WEIGHTS)
    p = np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
    start = [("say", 0, *rng.integers(0, 1 << 16, 3).tolist()), ("show", 0, *rng.integers(0, 1 << 16, 3).tolist())]
    return start + [(names[rng.choice(len(names), p=p)], int(rng.choice(4, p=[0.5, 0.2, 0.2, 0.1])), *rng.integers(0, 1 << 16, 3).tolist()) for _ in range(n - 2)]


@dataclass
class Script:
    """Operations as steps for both libraries, with what must come out."""

    name: str
    setting: Setting
    operations: Sequence[Operation]
    ours: list[Step] = field(default_factory=list)
    stock: list[Step] = field(default_factory=list)
    fresh: dict[int, tuple[int, list[Step]]] = field(default_factory=dict)  # sequence -> (step that says something at the end, steps that lead there)
    expected: dict[int, Any] = field(default_factory=dict)  # step -> what the model says
    op_of_step: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = CacheModel(self.setting.arch == "qwen2vl")
        self.saved: dict[int, tuple[CacheModel, int]] = {}
        for i, (name, seq, a, b, c) in enumerate(self.operations):
            seq %= self.setting.n_seq
            getattr(self, name)(seq, a, b, c)
            self.look(seq, a, b)
            self.op_of_step += [i] * (len(self.ours) - len(self.op_of_step))
        self.end()
        self.op_of_step += [len(self.operations)] * (len(self.ours) - len(self.op_of_step))

    def add(self, ours: Step, stock: Step | None = None) -> None:
        self.ours.append(ours)
        self.stock.append(stock or ours)

    def capsule_only(self, step: Step) -> None:
        self.add(step, positions())

    # --- decoding ---

    def say(self, seq: int, a: int, b: int, c: int) -> None:
        ids = np.random.default_rng(a).integers(0, VOCAB, 1 + b % 6).tolist()
        self.add(set_pos(seq, self.model.next(seq)))
        self.add(text(ids, seq=seq, one_by_one=c % 3 == 0))
        self.model.add(seq, map(Token, ids))

    def tell(self, seq: int, a: int, b: int, c: int) -> None:
        """A long text."""
        ids = np.random.default_rng(a).integers(0, VOCAB, 30 + b % 90).tolist()
        if len(self.model.cells) + len(ids) > TOKENS_MAX:
            return self.cut(seq, a, 0, 1)
        self.add(set_pos(seq, self.model.next(seq)))
        self.add(text(ids, seq=seq))
        self.model.add(seq, map(Token, ids))

    def show(self, seq: int, a: int, b: int, c: int) -> None:
        h, w = 1 + b % 9, 2 + c % 10
        if len(self.model.cells) + h * w > TOKENS_MAX:
            return self.cut(seq, a, 0, 1)
        self.add(set_pos(seq, self.model.next(seq)))
        self.add(image((h, w), a, seq))
        self.model.add(seq, [Token(a, i, h * w) for i in range(h * w)], w)

    def together(self, seq: int, a: int, b: int, c: int) -> None:
        ids = {s: (a + s) % VOCAB for s in range(self.setting.n_seq) if self.model.of(s)}
        if ids:
            for s in ids:
                self.add(set_pos(s, self.model.next(s)))
            self.add(together(ids))
            for s, token in ids.items():
                self.model.add(s, [Token(token)])

    def compress(self, seq: int, a: int, b: int, c: int) -> None:
        p0, p1 = (0, END) if c % 3 else sorted((a % (self.model.next(seq) + 1), b % (self.model.next(seq) + 5)))
        self.capsule_only(compress(seq, p0, p1))
        self.model.compress(seq, p0, p1)

    # --- sequences ---

    def cut(self, seq: int, a: int, b: int, c: int) -> None:
        p0, p1 = sorted((a % (self.model.next(seq) + 1), b % (self.model.next(seq) + 2)))
        self.remove(-1 if c % 16 == 0 else seq, p0, END if c % 4 == 1 else p1)

    def cut_end(self, seq: int, a: int, b: int, c: int) -> None:
        self.remove(seq, max(0, self.model.next(seq) - a % 12), END)

    def cut_slot(self, seq: int, a: int, b: int, c: int) -> None:
        """Some tokens inside a slot."""
        cold = [cell for cell in self.model.of(seq) if cell.slot]
        if cold:
            p0 = cold[a % len(cold)].pos
            self.remove(seq, p0, p0 + 1 + b % 18)

    def remove(self, seq: int, p0: int, p1: int) -> None:
        self.add(seq_rm(seq, p0, -1 if p1 == END else p1))
        self.model.rm(seq, p0, p1)

    def fork(self, seq: int, a: int, b: int, c: int) -> None:
        if self.setting.n_seq > 1:
            other = (seq + 1 + a % (self.setting.n_seq - 1)) % self.setting.n_seq
            p1 = END if c % 3 else 1 + b % (self.model.next(seq) + 1)
            self.remove(other, 0, END)
            self.add(seq_cp(seq, other, 0, -1 if p1 == END else p1))
            self.model.cp(seq, other, p1)

    def shift(self, seq: int, a: int, b: int, c: int) -> None:
        """A context shift: everything from some position on moves, closing a gap if there is one."""
        if self.model.mrope:
            return
        mine = self.model.of(seq)
        gaps = [y.pos for x, y in zip(mine, mine[1:]) if y.pos > x.pos + 1]
        p0 = gaps[a % len(gaps)] if gaps and b % 4 else a % (self.model.next(seq) + 1)
        before = max((x.pos for x in mine if x.pos < p0), default=-1)
        for delta in (before + 1 - p0, 1 + c % 5):
            if delta and self.model.can_shift(seq, p0, delta):
                self.add(seq_add(seq, p0, -1, delta))
                self.model.shift(seq, p0, delta)
                # the stock library would save keys that are not rotated yet: a decode makes it rotate them
                spare = self.setting.n_seq
                self.add(positions(), text([0], seq=spare))
                self.add(positions(), seq_rm(spare, 0, -1))
                return

    def keep(self, seq: int, a: int, b: int, c: int) -> None:
        self.add(seq_keep(seq))
        self.model.keep(seq)

    def clear(self, seq: int, a: int, b: int, c: int) -> None:
        self.add(clear())
        self.model.clear()

    # --- states ---

    def save(self, seq: int, a: int, b: int, c: int) -> None:
        seq = -1 if c % 3 == 0 else seq
        self.add(state_save(f"{self.name}-{a % 3}", seq, b % 2 if seq >= 0 else 0))
        self.saved[a % 3] = (self.model.save(seq), seq)

    def restore(self, seq: int, a: int, b: int, c: int) -> None:
        if not self.saved:
            return self.save(seq, a, b, c)
        slot = sorted(self.saved)[a % len(self.saved)]
        saved, of = self.saved[slot]
        if of >= 0 and len(self.model.cells) + len(saved.cells) > CELLS - 100:
            return self.clear(seq, a, b, c)
        self.forget(of, seq)
        self.add(state_load(f"{self.name}-{slot}", -1 if of < 0 else seq))
        self.model.restore(saved, -1 if of < 0 else seq)

    def spoil(self, seq: int, a: int, b: int, c: int) -> None:
        """A damaged state leaves nothing."""
        if not self.saved:
            return
        slot = sorted(self.saved)[a % len(self.saved)]
        _, of = self.saved[slot]
        how = {"cut": 0.3 + 0.6 * b / (1 << 16)} if c % 2 else {"flip": b / (1 << 16)}
        self.capsule_only(state_spoil(f"{self.name}-{slot}", f"{self.name}-bad", **how))
        self.forget(of, seq)
        self.capsule_only(state_load(f"{self.name}-bad", -1 if of < 0 else seq, may_fail=True))
        self.expected[len(self.ours) - 1] = "refused"
        self.add(clear() if of < 0 else seq_rm(seq, 0, -1))
        self.model.clear() if of < 0 else self.model.rm(seq, 0, END)

    def forget(self, of: int, seq: int) -> None:
        """The stock library does not remove what is there if the state of a sequence holds no cells."""
        self.add(positions(), seq_rm(seq, 0, -1) if of >= 0 else None)

    # --- checks ---

    def look(self, seq: int, a: int, b: int) -> None:
        p0, p1 = (0, END) if a % 2 else sorted((a % (self.model.next(seq) + 1), b % (self.model.next(seq) + 2)))
        self.expected[len(self.ours)] = [c.token for c in self.model.of(seq, p0, p1)]
        self.capsule_only(contents(seq, p0, p1))
        self.expected[len(self.ours)] = self.model.positions(seq)
        self.add(positions(seq))
        self.expected[len(self.ours)] = self.model.counts()
        self.capsule_only(stats())

    def end(self) -> None:
        for seq in range(self.setting.n_seq):
            self.look(seq, 1, 0)
            comparable = self.setting.n_layer == 1 or self.model.pure(seq) is not None
            if comparable and self.model.of(seq):
                self.fresh[seq] = (len(self.ours) + 1, afresh(self.model, seq))
            if self.model.of(seq):
                self.say(seq, 7 + seq, 3, 1)

    # --- cases ---

    def cases(self, folder: Callable[[TinyModel], Path], capsule: Callable[..., Path]) -> tuple[Case, list[Case]]:
        """For our library, and for the stock one: the same steps, then each fresh evaluation."""
        s = self.setting
        model = folder(s.model)
        common = {"flash_attn": s.flash_attn, "type_k": "f32", "type_v": "f32", "n_ctx": CELLS, "n_ubatch": s.n_ubatch}
        ours = Case(self.name, model, self.ours, capsule=capsule(model), n_hot=HOT, auto_compress=s.auto, n_seq_max=s.n_seq, **common)
        stock = [Case(self.name, model, self.stock, n_seq_max=s.n_seq + 1, **common)]
        for seq, (at, steps) in self.fresh.items():
            stock.append(Case(f"{self.name}/{seq}", model, [*steps, self.ours[at] | {"seq": 0}], **common))
        return ours, stock

    def where(self, i: int) -> str:
        return f"step {i} ({self.ours[i]['op']}) of operation {self.op_of_step[i]}"

    def problem(self, ours: Result, stock: dict[str, Result]) -> str:
        """The first thing that is wrong, or ""."""
        truth = stock[self.name]
        if truth.error:
            return f"the script itself is wrong: {truth.error}"
        for i, want in self.expected.items():
            if i < len(ours.steps) and (wrong := self._differs(want, ours.steps[i])):
                return f"{self.where(i)}: {wrong}"
        if ours.error:
            return ours.error
        limit = 100 * lossless_limit(self.setting.flash_attn, "f32")
        for i, (a, b) in enumerate(zip(ours.steps, truth.steps)):
            if "logits" in a.arrays and (e := nmse(a.arrays["logits"], b.arrays["logits"])) > limit:
                return f"{self.where(i)}: logits differ from stock, NMSE {e:.1e}"
        for seq, (at, _) in self.fresh.items():
            again = stock[f"{self.name}/{seq}"]
            if again.error:
                return f"the fresh evaluation of sequence {seq} is wrong: {again.error}"
            if (e := nmse(ours.steps[at].arrays["logits"], again.steps[-1].arrays["logits"])) > limit:
                return f"sequence {seq} at the end: logits differ from a fresh evaluation, NMSE {e:.1e}"
        return ""

    def _differs(self, want: Any, step: Any) -> str:
        if want == "refused":
            return "" if step.rc == 1 else "a damaged state was accepted"
        if "positions" in step.values:
            return "" if step.values["positions"] == want else f"positions {step.values['positions']}, expected {want}"
        if "stats" in step.values:
            seen = step.values["stats"]
            if self.setting.arch != "qwen2vl":  # the width of an image is read from its keys, and these are noise: any number of tiles may be right
                want = {k: v for k, v in want.items() if k != "slots"}
            seen = {k: (seen | {"slots": sum(seen["n_slots_tier"])})[k] for k in want}
            if self.setting.auto:  # when an image is compressed is not modelled, what is there is
                want, seen = ({"vision": c["n_hot_vision"] + c["n_cold"], "text": c["n_hot_used"] - c["n_hot_vision"]} for c in (want, seen))
            return "" if seen == want else f"counts {seen}, expected {want}"
        rows = step.arrays.get("contents")
        if rows is None or len(rows) != len(want):
            return f"{-1 if rows is None else len(rows)} cells, expected {len(want)}"
        truth = first_layer(self.setting.model, want)
        bad = np.flatnonzero(np.abs(rows - truth).max(1, initial=0) > 5e-3)
        return f"cell {bad[0]} does not hold {want[bad[0]]}" if len(bad) else ""
