"""Time of batches, in turns: what else the machine does hits all contexts alike. With one thread it is processor time, with more of them the clock's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.errors import KVCapsuleError

TOKEN, QUESTION = 5, 64  # any token; tokens of a question
WARM_UP = 2  # rounds: the graphs are built


class BenchError(KVCapsuleError):
    """The text is one line for the user."""


def decode(llama: Any, ctx: int, n: int, clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of a batch of n tokens behind sequence 0; its cells are freed again."""
    memory = llama.llama_get_memory(ctx)
    start = llama.llama_memory_seq_pos_max(memory, 0) + 1
    tokens = (llama.llama_token * n)(*([TOKEN] * n))
    before = clock()
    failed = llama.llama_decode(ctx, llama.llama_batch_get_one(tokens, n))
    llama.llama_synchronize(ctx)
    took = clock() - before
    if failed:
        raise BenchError(f"llama_decode returned {failed}")
    llama.llama_memory_seq_rm(memory, 0, start, -1)
    return took


def in_turns(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """name -> seconds of each round; within a round every timer runs once, in their order."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for i in range(rounds + WARM_UP):
        for name, timer in timers.items():
            took = timer()
            if i >= WARM_UP:
                times[name].append(took)
    return times


@dataclass(frozen=True)
class Ratio:
    """How many times faster: the median of the ratios within a round, and its 95 % interval (bootstrap over rounds)."""

    times: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.times:.2f} ({self.low:.2f} to {self.high:.2f})"


def speedup(times: list[float], base: list[float]) -> Ratio:
    """Of `times` over `base`, both in seconds by round."""
    ratios = np.array(base) / np.maximum(times, 1e-9)
    drawn = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], 1), (0.025, 0.975))
    return Ratio(float(np.median(ratios)), float(low), float(high))
