"""Exact match per task while training, without writing answers."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from torch import Tensor

from ..scenes import TASKS, Question


class Scores:
    """An answer counts if every one of its tokens, end included, is the most likely one."""

    def __init__(self) -> None:
        self.hits: dict[str, list[bool]] = defaultdict(list)

    def add(self, right: Tensor, targets: Tensor, segments: np.ndarray, asked: list[list[Question]]) -> None:
        """right bool, targets [B, T] (negative: no answer token); segments int [B, T]: the number of the question, of those that were `asked`."""
        met = (right.cpu() | (targets.cpu() < 0)).numpy()
        for row, questions in enumerate(asked):
            for i, question in enumerate(questions):
                where = segments[row] == i
                if where.any():
                    self.hits[question.task].append(bool(met[row][where].all()))

    def shares(self) -> dict[str, float]:
        """Of each task, and of all questions."""
        out = {task: float(np.mean(self.hits[task])) for task in TASKS if self.hits[task]}
        return out | {"all": float(np.mean([h for v in self.hits.values() for h in v]))}
