"""How many rows of which type: the cheapest error for a given number of bytes, from the measured energies of the rows.

A row of energy e stored in a type of relative error D costs e * D; with the bytes of the types this is a classic rate allocation: for a price
lambda per byte every row takes the type with the least e * D + lambda * bytes, and lambda is found by bisection. Energies fall along a list, so the
types do too. "Grade, don't drop" (docs/reference/format-v1.md, "Why these choices"): as long as all rows fit, none is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..codec.types import F16, Q2_0, Q4_0, Q8_0, ROW_TYPES, RowCounts, RowType, legal, row_counts, rows_bytes

# relative squared error on rows of Gaussian numbers, which Hadamard-rotated rows resemble (tests/test_codec_quantize.py)
DISTORTION = {"f16": 5e-8, "q8_0": 2.9e-5, "q4_0": 7.8e-3, "q2_0": 0.1233}
DROPPED = 1.0
KEY_WEIGHT = 2.0  # an error of keys costs more attention than the same relative error of values (docs/reference/format-v1.md)
ALL_ROWS_BITS = 2.75  # bits per value from which on every row is kept

PRESETS = {"paper": 0.6, "default": 0.8, "small": 0.875}
MAX_GROUPS = 16  # layers of a deep model are probed together with their neighbours (sensitivity.py)
PROBE_PICTURES = 12
LAYER_SCHEDULES = ("sensitivity", "uniform", "pyramid")


@dataclass(frozen=True)
class Part:
    """The keys or the values of one layer (or of several that share a schedule): energy f64 [N] per row, relative to their sum."""

    energy: np.ndarray
    d: int
    heads: int

    def bytes(self, counts: Sequence[int]) -> int:
        return self.heads * rows_bytes(counts, self.d)


def probe_count(n_layers: int) -> int:
    """Runs over a picture that measuring the sensitivities takes: keys and values of every group, and the reference."""
    return 2 * min(n_layers, MAX_GROUPS) + 1


def faithful_rows(n: int, d: int) -> RowCounts:
    """All rows, one in twelve in q8_0 and the rest in q4_0: 3.3x, and closer than q4_0 itself."""
    head = max(1, round(n / 12))
    return legal(row_counts(q8_0=head, q4_0=n - head), d)


def allocate(parts: Sequence[Part], n: int, ratio: float) -> list[RowCounts]:
    """Rows of every part so that 1 - bytes / bytes(f16) is at least `ratio`, or as near to it as the types allow."""
    f16 = sum(2 * n * p.heads * p.d for p in parts)
    budget = (1 - ratio) * f16 + 0.5  # of a byte: 1 - ratio is not exact
    all_rows = 16 * (1 - ratio) >= ALL_ROWS_BITS and sum(p.bytes(_cheapest(n, p.d)) for p in parts) <= budget
    low, high = 1e-16, 1e3  # prices: everything too dear, everything dropped
    for _ in range(80):
        price = (low * high) ** 0.5
        chosen = [_choose(p, n, price, all_rows) for p in parts]
        if sum(p.bytes(c) for p, c in zip(parts, chosen)) <= budget:
            high = price
        else:
            low = price
    chosen = [_choose(p, n, high, all_rows) for p in parts]
    return _fill(parts, chosen, budget)


def _types(d: int) -> list[RowType]:
    """Those that the list may use, best first; f16 only where nothing else fits."""
    return [t for t in (Q8_0, Q4_0, Q2_0) if t.fits(d)] or [F16]


def _cheapest(n: int, d: int) -> RowCounts:
    return legal(row_counts(q2_0=n), d)


def _choose(part: Part, n: int, price: float, all_rows: bool) -> RowCounts:
    """The best rows at a price; their number is N or a multiple of 16, which the matrix kernels want."""
    types = _types(part.d)
    energy = np.minimum.accumulate(part.energy)
    per_byte = price * part.heads
    costs = np.stack([energy * DISTORTION[t.name] + per_byte * t.row_bytes(part.d) for t in types], 1)  # [N, types]
    best_type = costs.argmin(1)
    best_cost = np.take_along_axis(costs, best_type[:, None], 1)[:, 0]
    totals = [n] if all_rows else sorted({*range(16, n, 16), n} | ({8} if n > 16 else set()))
    dropped = np.append(np.cumsum(energy[::-1])[::-1], 0.0) * DROPPED
    total = min(totals, key=lambda r: best_cost[:r].sum() + dropped[r])
    return row_counts(**{t.name: int((best_type[:total] == i).sum()) for i, t in enumerate(types)})


def _fill(parts: Sequence[Part], chosen: list[RowCounts], budget: float) -> list[RowCounts]:
    """Spends what is left of the budget: the row that gains most per byte goes one type up, as long as one fits."""
    left = budget - sum(p.bytes(c) for p, c in zip(parts, chosen))
    while True:
        steps = []
        for i, (part, counts) in enumerate(zip(parts, chosen)):
            for better, worse in zip(_types(part.d), _types(part.d)[1:]):
                a, b = ROW_TYPES.index(better), ROW_TYPES.index(worse)
                cost = part.heads * (better.row_bytes(part.d) - worse.row_bytes(part.d))
                if counts[b] and cost <= left:
                    row = sum(counts[:b])
                    gain = part.energy[row] * (DISTORTION[worse.name] - DISTORTION[better.name])
                    steps.append((gain / cost, i, a, b, cost))
        if not steps:
            return chosen
        _, i, a, b, cost = max(steps)
        counts = list(chosen[i])
        counts[a] += 1
        counts[b] -= 1
        chosen[i] = tuple(counts)  # type: ignore[assignment]
        left -= cost


def retain_rows(energy: np.ndarray, kept: int, d: int, ratio: float) -> RowCounts:
    """Rows of a `retain` key list with the least error for its bytes; energy f64 [N] of kept keys, then of residuals, falling.

    Tries every number of kept keys in q8_0 (the others in q4_0) with every number of residuals in q4_0, and 2-bit residuals as long as bytes last.
    """
    n = len(energy)
    budget = (1 - ratio) * 2 * n * d + 0.5
    kept_mean, residual = float(energy[:kept].mean()), energy[kept:]
    below = np.append(np.cumsum(residual[::-1])[::-1], 0.0)  # energy of the residuals from one on
    best, least = legal(row_counts(q4_0=kept), d), np.inf
    for q8 in range(kept + 1):
        for q4 in range(n - kept + 1):
            used = rows_bytes(legal(row_counts(q8_0=q8, q4_0=kept - q8 + q4), d), d)
            if used > budget:
                break
            q2 = min(n - kept - q4, int((budget - used) // rows_bytes(legal(row_counts(q2_0=1), d), d)))
            cost = kept_mean * (q8 * DISTORTION["q8_0"] + (kept - q8) * DISTORTION["q4_0"]) + (below[0] - below[q4]) * DISTORTION["q4_0"]
            cost += (below[q4] - below[q4 + q2]) * DISTORTION["q2_0"] + below[q4 + q2] * DROPPED
            if cost < least:
                best, least = legal(row_counts(q8_0=q8, q4_0=kept - q8 + q4, q2_0=q2), d), cost
    return best


def layer_ratios(n_layers: int, ratio: float, slope: float = 0.3) -> list[float]:
    """The paper's monotone pyramid: the bytes of layer l fall linearly from (1 + slope) to (1 - slope) times the mean."""
    at = np.linspace(1, -1, n_layers) if n_layers > 1 else np.zeros(1)
    return [1 - (1 - ratio) * (1 + slope * float(x)) for x in at]


def schedule(
    keys: Sequence[Part], values: Sequence[Part], n: int, ratio: float, layers: str = "uniform", weights: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[list[RowCounts], list[RowCounts]]:
    """Rows of the keys and of the values of every layer (`keys[l]` and `values[l]` are layer l's).

    `sensitivity`: one allocation over all layers; weights f64 [L] of keys and values say what a unit of relative error costs there.
    """
    if layers == "sensitivity":
        assert weights is not None
        parts = [Part(w * p.energy, p.d, p.heads) for w, p in zip(np.concatenate(weights), [*keys, *values])]
        chosen = allocate(parts, n, ratio)
        return chosen[: len(keys)], chosen[len(keys) :]
    keys = [Part(KEY_WEIGHT * k.energy, k.d, k.heads) for k in keys]
    if layers == "pyramid":
        pairs = [allocate([k, v], n, r) for k, v, r in zip(keys, values, layer_ratios(len(keys), ratio))]
        return [p[0] for p in pairs], [p[1] for p in pairs]
    # layers of the same shape share their rows
    out: dict[tuple[int, ...], list[RowCounts]] = {}
    shapes = [(k.d, k.heads, v.d, v.heads) for k, v in zip(keys, values)]
    for shape in dict.fromkeys(shapes):
        same = [i for i, s in enumerate(shapes) if s == shape]
        mean_k = Part(np.mean([keys[i].energy for i in same], 0), shape[0], shape[1])
        mean_v = Part(np.mean([values[i].energy for i in same], 0), shape[2], shape[3])
        out[shape] = allocate([mean_k, mean_v], n, ratio)
    return [out[s][0] for s in shapes], [out[s][1] for s in shapes]
