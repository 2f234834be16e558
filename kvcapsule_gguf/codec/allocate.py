"""How many bits each block of coefficients gets: the least error for the bytes, by the errors measured on the pictures that are fitted to."""

from __future__ import annotations

import numpy as np


def allocate(errors: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """errors, costs [..., types] of every block with every type; budget: the sum of costs allowed -> int [...]: the type of every block.

    Minimises error + lambda * cost in every block, with the smallest lambda that keeps the budget; then hands out what is left, best gain first.
    A type that is not allowed has an infinite error or cost.
    """
    e, c = (np.asarray(x, np.float64).reshape(-1, errors.shape[-1]) for x in np.broadcast_arrays(errors, costs))
    low, high = 0.0, 1.0
    while _cost(c, _best(e, c, high)) > budget:
        low, high = high, high * 4
        if high > 1e30:
            raise ValueError("the budget is below the smallest table")
    for _ in range(60):
        middle = (low + high) / 2 if low == 0 else (low * high) ** 0.5
        low, high = (middle, high) if _cost(c, _best(e, c, middle)) > budget else (low, middle)
        if low and high / low < 1 + 1e-9:
            break
    pick = _best(e, c, high)
    _spend(e, c, pick, budget - _cost(c, pick))
    return pick.reshape(errors.shape[:-1])


def _best(e: np.ndarray, c: np.ndarray, price: float) -> np.ndarray:
    return (e + price * c).argmin(-1)


def _cost(c: np.ndarray, pick: np.ndarray) -> float:
    return float(np.take_along_axis(c, pick[:, None], 1).sum())


def _spend(e: np.ndarray, c: np.ndarray, pick: np.ndarray, left: float) -> None:
    """Raises blocks by their best single step while the rest of the budget allows."""
    at = np.arange(len(e))
    with np.errstate(divide="ignore", invalid="ignore"):
        more = c - c[at, pick][:, None]
        gain = np.where(more > 0, (e[at, pick][:, None] - e) / more, -np.inf)
    step = gain.argmax(1)
    for i in np.argsort(-gain[at, step]):
        cost = c[i, step[i]] - c[i, pick[i]]
        if gain[i, step[i]] > 0 and cost <= left:
            pick[i], left = step[i], left - cost

