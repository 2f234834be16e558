"""What should be in a cache with a lossless capsule, said in plain Python: cells with a position, a token and sequences, hot or in a slot."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from math import isqrt

END = 1 << 30


@dataclass(frozen=True)
class Token:
    """A text token, or token `index` of an image of n embeddings made from a seed."""

    id: int
    index: int = -1
    n: int = 0

    @property
    def vision(self) -> bool:
        return self.index >= 0


@dataclass(eq=False)
class Cell:
    pos: int
    y: int
    x: int
    token: Token
    seqs: set[int]
    slot: int | None = None  # its number, None = hot
    slot_size: int = 0  # tokens of the slot when it was made
    history: int = 0  # what it was computed from: a hash of the cells before it

    @property
    def order(self) -> tuple[int, int, int]:
        return self.pos, self.y, self.x


@dataclass
class CacheModel:
    """Every vision cell goes into a slot. Slots are tiles of 8 x 8 tokens; what has no grid, or is left of a tile, makes lines of 8."""

    mrope: bool
    cells: list[Cell] = field(default_factory=list)
    next_pos: dict[int, int] = field(default_factory=dict)  # M-RoPE: an image takes more positions than its cells show
    n_slots: int = 0  # ever made

    def of(self, seq: int, p0: int = 0, p1: int = END) -> list[Cell]:
        """The cells of a sequence (< 0: of any) with a position in [p0, p1), in order."""
        return sorted((c for c in self.cells if (seq < 0 or seq in c.seqs) and p0 <= c.pos < p1), key=lambda c: c.order)

    def next(self, seq: int) -> int:
        if self.mrope:
            return self.next_pos.get(seq, 0)
        return max((c.pos for c in self.of(seq)), default=-1) + 1

    def pure(self, seq: int) -> int | None:
        """The hash of a sequence; None if its cells saw something else than what is in front of them now."""
        h = 0
        for c in self.of(seq):
            h = self._hash(h, c)
            if c.history != h:
                return None
        return h

    @staticmethod
    def _hash(before: int, c: Cell) -> int:
        return hash((before, c.order, c.token))

    # --- decoding ---

    def add(self, seq: int, tokens: Iterable[Token], width: int = 0) -> None:
        """Text, or an image if it has a width."""
        start, h, i = self.next(seq), self.pure(seq), -1
        for i, token in enumerate(tokens):
            if not self.mrope:
                at = (start + i, 0, 0)
            elif width:
                at = (start, start + i // width, start + i % width)
            else:
                at = (start + i, start + i, start + i)
            c = Cell(*at, token, {seq})
            h = None if h is None else self._hash(h, c)
            c.history = -1 if h is None else h
            self.cells.append(c)
        self.next_pos[seq] = start + (max(width, (i + width) // width) if self.mrope and width else i + 1)

    def compress(self, seq: int, p0: int, p1: int) -> None:
        for run in self._runs(seq, p0, p1):
            first, n = run[0].pos, run[-1].pos - run[0].pos + 1
            side = isqrt(n) if isqrt(n) ** 2 == n else 0  # a square number of tokens is taken for a square
            if not (self.mrope or side):
                self._lines(run)
                continue
            places = {id(c): (c.y, c.x) if self.mrope else divmod(c.pos - first, side) for c in run}
            y0, x0 = (min(at) for at in zip(*places.values()))
            for _, tile in groupby(sorted(run, key=lambda c: (tile_of(places[id(c)], y0, x0), places[id(c)])), key=lambda c: tile_of(places[id(c)], y0, x0)):
                cells = list(tile)
                sides = [max(at) - min(at) + 1 for at in zip(*(places[id(c)] for c in cells))]
                if sides[0] * sides[1] == len(cells):
                    self._slot(cells)
                else:
                    self._lines(cells)

    def _lines(self, cells: list[Cell]) -> None:
        whole = len(cells) // 8 * 8
        for i in range(0, whole, 64):
            self._slot(cells[i:min(i + 64, whole)])
        self._slot(cells[whole:])

    def _slot(self, cells: list[Cell]) -> None:
        self.n_slots += 1
        for c in cells:
            c.slot, c.slot_size = self.n_slots, len(cells)

    def _runs(self, seq: int, p0: int, p1: int) -> list[list[Cell]]:
        """Hot vision cells without text between them; with M-RoPE a new position is a new image."""
        runs = groupby((c for c in self.of(seq, p0, p1) if c.slot is None), key=lambda c: (c.token.vision, c.pos if self.mrope and c.token.vision else 0))
        return [list(run) for (vision, _), run in runs if vision]

    # --- sequences ---

    def _drop(self, gone: Callable[[Cell], bool], seqs: Iterable[int]) -> None:
        for c in self.cells:
            if gone(c):
                c.seqs -= set(seqs)
        self.cells = [c for c in self.cells if c.seqs]

    def rm(self, seq: int, p0: int, p1: int) -> None:
        seqs = range(64) if seq < 0 else [seq]
        self._drop(lambda c: p0 <= c.pos < p1, seqs)
        for s in seqs:
            if p1 >= self.next_pos.get(s, 0):
                self.next_pos[s] = min(self.next_pos.get(s, 0), p0)

    def cp(self, src: int, dst: int, p1: int) -> None:
        for c in self.of(src, 0, p1):
            c.seqs.add(dst)
        self.next_pos[dst] = min(self.next_pos.get(src, 0), p1)

    def keep(self, seq: int) -> None:
        self._drop(lambda c: True, set(range(64)) - {seq})
        self.next_pos = {seq: self.next_pos.get(seq, 0)}

    def shift(self, seq: int, p0: int, delta: int) -> None:
        for c in self.of(seq, p0):
            c.pos += delta

    def can_shift(self, seq: int, p0: int, delta: int) -> bool:
        """No cell would pass another one of any sequence, or fall off."""
        moved = set(map(id, self.of(seq, p0)))
        for s in range(64):
            at = [c.pos + (delta if id(c) in moved else 0) for c in self.of(s)]
            if any(a >= b for a, b in zip([-1, *at], at)):
                return False
        return True

    def clear(self) -> None:
        self.cells, self.next_pos = [], {}

    # --- states ---

    def save(self, seq: int) -> CacheModel:
        """A copy, of one sequence (as number 0) if seq >= 0."""
        out = copy.deepcopy(self)
        if seq >= 0:
            out.keep(seq)
            for c in out.cells:
                c.seqs = {0}
            out.next_pos = {0: out.next_pos.get(seq, 0)}
        return out

    def restore(self, saved: CacheModel, seq: int) -> None:
        saved = copy.deepcopy(saved)
        for c in saved.cells:
            c.slot = c.slot and c.slot + self.n_slots
        if seq < 0:
            self.cells, self.next_pos = saved.cells, saved.next_pos
        else:
            self.rm(seq, 0, END)
            for c in saved.cells:
                c.seqs = {seq}
            self.cells += saved.cells
            self.next_pos[seq] = saved.next_pos[0]
        self.n_slots += saved.n_slots

    # --- what a client sees ---

    def positions(self, seq: int) -> list[int]:
        at = [c.pos for c in self.of(seq)]
        return [min(at, default=-1), max(at, default=-1)]

    def cut(self) -> bool:
        """Has a slot lost tokens?"""
        left = Counter(c.slot for c in self.cells)
        return any(c.slot and left[c.slot] < c.slot_size for c in self.cells)

    def counts(self) -> dict[str, int]:
        hot = [c for c in self.cells if c.slot is None]
        slots = {c.slot for c in self.cells if c.slot}
        return {"n_hot_used": len(hot), "n_hot_vision": sum(c.token.vision for c in hot), "n_cold": len(self.cells) - len(hot),
                "slots": len(slots)}


def tile_of(place: tuple[int, int], y0: int, x0: int) -> tuple[int, int]:
    return (place[0] - y0) // 8, (place[1] - x0) // 8
