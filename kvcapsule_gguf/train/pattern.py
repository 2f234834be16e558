"""Which tokens of a block `retain` keeps, and which kept ones each dropped token is predicted from."""

from __future__ import annotations

import numpy as np

# the fractional parts of i * GOLDEN fill the unit interval evenly for every number of them
GOLDEN = (5**0.5 - 1) / 2


def kept_tokens(n: int, m: int, width: int = 0) -> np.ndarray:
    """int [m], ascending: m of n tokens, spread evenly; with the width of the image rows, shifted from row to row as well."""
    t = np.arange(n)
    row = t // width if width else np.zeros_like(t)
    value = (t * GOLDEN + row * 0.5) % 1.0
    return np.sort(np.argsort(value, kind="stable")[:m])


def neighbours(n: int, kept: np.ndarray, count: int, width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(dropped int [n-m] ascending, int [n-m, count]: row indices of kept tokens).

    First the nearest kept token on the left and on the right in the sequence, then the nearest in the row above and below (`width` tokens away),
    then, where one of them does not exist or for more of them, the nearest that are left.
    """
    dropped = np.setdiff1d(np.arange(n), kept)
    out = np.empty((len(dropped), count), dtype=np.int32)
    for j, t in enumerate(dropped):
        chosen: list[int] = []
        for direction in (-1, 1):
            side = [i for i in range(len(kept)) if (kept[i] - t) * direction > 0]
            chosen += [min(side, key=lambda i: abs(kept[i] - t))] if side else []
        if width:
            for direction in (-1, 1):
                target = t + direction * width
                row = [i for i in range(len(kept)) if kept[i] // width == target // width and i not in chosen] if 0 <= target < n else []
                chosen += [min(row, key=lambda i: abs(kept[i] - target))] if row else []
        rest = sorted((i for i in range(len(kept)) if i not in chosen), key=lambda i: (abs(kept[i] - t), i))
        picked = (chosen + rest)[:count]
        # fewer kept tokens than neighbours: the last is repeated, the gates share it
        out[j] = picked + [picked[-1]] * (count - len(picked))
    return dropped, out


def most_used_first(kept: np.ndarray, near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """kept and near of neighbours(), the kept tokens ordered by how many others they predict: attention reads neighbouring rows with as many queries as the busiest of
    them needs (llama-capsule-query.cpp), and the first rows get the most bits."""
    order = np.argsort(-np.bincount(near.ravel(), minlength=len(kept)), kind="stable")
    return kept[order], np.argsort(order)[near].astype(near.dtype)
