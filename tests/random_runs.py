"""Runs scripts of random_operations.py on both libraries, and makes a failing one short."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from llama_runner import run
from make_capsule import random_capsule
from random_operations import Operation, Script, Setting
from tiny_gguf import ModelStore


class Runner:
    def __init__(self, folder: Path, patched: Path, stock: Path) -> None:
        self.folder, self.patched, self.stock = folder, patched, stock
        self.models = ModelStore(folder)

    def capsule(self, model: Path) -> Path:
        path = self.folder / f"capsule-{model.stem}.gguf"
        return path if path.exists() else random_capsule(model, path)

    def problems(self, scripts: Sequence[Script]) -> dict[str, str]:
        """name -> what went wrong, of those that failed. All run in one process of each library."""
        cases = [s.cases(self.models, self.capsule) for s in scripts]
        ours = run([c for c, _ in cases], self.patched)
        stock = run([c for _, more in cases for c in more], self.stock)
        found = {s.name: s.problem(ours[s.name], stock) for s in scripts}
        return {name: text for name, text in found.items() if text}

    def shrink(self, setting: Setting, operations: Sequence[Operation], say: Callable[[str], None] = lambda text: None) -> tuple[list[Operation], str]:
        """The shortest part of a failing script that still fails, and its problem: all ways to leave out a piece are tried at once."""
        ops = list(operations)
        problem = self.problems([Script("s", setting, ops)]).get("s", "")
        size = max(1, len(ops) // 2)
        while problem:
            tries = list(without(ops, size))
            found = self.problems([Script(str(i), setting, t) for i, t in enumerate(tries)])
            if found:
                first = min(found, key=int)
                ops, problem = tries[int(first)], found[first]
                say(f"{len(ops)} operations still fail: {problem}")
                size = min(size, max(1, len(ops) // 2))
            elif size == 1:
                break
            else:
                size //= 2
        return ops, problem


def without(ops: list[Operation], size: int) -> Iterator[list[Operation]]:
    for i in range(0, len(ops), size):
        if rest := ops[:i] + ops[i + size:]:
            yield rest


def repro(setting: Setting, operations: Sequence[Operation]) -> str:
    """For `scripts/random_operations --replay`."""
    return json.dumps({"setting": asdict(setting), "operations": operations})


def parse_repro(text: str) -> tuple[Setting, list[Operation]]:
    data = json.loads(text)
    return Setting(**data["setting"]), [tuple(op) for op in data["operations"]]
