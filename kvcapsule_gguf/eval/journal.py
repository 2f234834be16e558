"""What was measured, picture by picture: a long run can be interrupted, and a finished one be asked about other caches later."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from ..chat.files import BUILT_IN
from .samples import Sample
from .settings import Setting
from .vlm import EvalError


@dataclass
class SeenBy:
    """One picture with one setting: as in Measured."""

    kld: list[float]
    exact: list[bool]
    agree: list[float]
    bytes_f16: int
    bytes_now: int
    slots: dict[str, int]  # of each tier
    seconds: float


@dataclass
class Seen:
    """One picture with several settings."""

    task: list[str]
    tokens: list[int]
    n_vision: int
    settings: dict[Setting, SeenBy]


class Journal:
    """A JSON line for every picture and run. Without a path it only remembers. A line that was not finished counts for nothing."""

    def __init__(self, path: Path | None, model: Path, settings: list[Setting], how: tuple) -> None:
        """how: whatever else changes the numbers. Raises EvalError for a file of another run."""
        self.path = path
        self.file: TextIO | None = None
        self.run = [model.name, model.stat().st_size, *how]
        self.names = {s: _identity(s) for s in settings}
        self.seen: dict[str, Seen] = {}

    def __enter__(self) -> Journal:
        if self.path is None:
            return self
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        for number, line in enumerate(text.splitlines(), 1):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if not isinstance(entry, dict) or entry.get("run") != self.run:
                raise EvalError(f"{self.path} is of another run: repeat that one to go on, or delete the file")
            try:
                by_name = {s: SeenBy(**entry["settings"][name]) for s, name in self.names.items() if name in entry["settings"]}
                self._merge(entry["picture"], Seen(entry["task"], entry["tokens"], entry["n_vision"], by_name))
            except (KeyError, TypeError):
                raise EvalError(f"{self.path}: line {number} is not of this program: delete the line, or the file") from None
        self.file = self.path.open("a")
        if text and not text.endswith("\n"):
            self.file.write("\n")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.file:
            self.file.close()

    def get(self, sample: Sample) -> Seen:
        """Of all settings. Raises KeyError if something is missing."""
        return self.seen[_key(sample)]

    def missing(self, sample: Sample) -> list[Setting]:
        """What is still to be measured."""
        seen = self.seen.get(_key(sample))
        return [s for s in self.names if not seen or s not in seen.settings]

    def put(self, sample: Sample, seen: Seen) -> None:
        self._merge(_key(sample), seen)
        if self.file:
            found = {self.names[s]: asdict(x) for s, x in seen.settings.items()}
            entry = {"run": self.run, "picture": _key(sample), "task": seen.task, "tokens": seen.tokens, "n_vision": seen.n_vision, "settings": found}
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()

    def _merge(self, key: str, seen: Seen) -> None:
        if key in self.seen:
            self.seen[key].settings.update(seen.settings)
        else:
            self.seen[key] = seen


def _key(sample: Sample) -> str:
    questions = json.dumps([(q.prompt, q.answer) for q in sample.questions])
    return f"{sample.name} {hashlib.sha256(questions.encode()).hexdigest()[:16]}"


def _identity(setting: Setting) -> str:
    """What distinguishes a setting, the capsule's contents included."""
    built_in = str(setting.capsule) == BUILT_IN
    content = BUILT_IN if built_in else hashlib.sha256(setting.capsule.read_bytes()).hexdigest()[:16] if setting.capsule else ""
    quality = [setting.quality] if setting.quality else []  # older journals have none
    narrow = [setting.image_attention, setting.uncompressed] if setting.image_attention != "full" else []
    return json.dumps([setting.k, setting.v, setting.vision, setting.drop, setting.ratio, setting.floor, content, *quality, *narrow])
