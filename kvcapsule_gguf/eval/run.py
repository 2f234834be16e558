"""The measurement: every setting sees the same pictures and the same forced answers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .cache import Cache
from .prompts import Prompts
from .settings import Setting
from .suites import Asked, Sample
from .vlm import EvalError, Picture, Vlm

MAX_WRITTEN = 48  # tokens of an answer that the model writes itself


@dataclass
class Measured:
    """One setting; the lists have an entry for each question."""

    setting: Setting
    kld: list[float] = field(default_factory=list)  # mean over the answer's tokens, in nats, against the reference
    exact: list[bool] = field(default_factory=list)  # greedy decoding gives the answer, token for token
    agree: list[float] = field(default_factory=list)  # share of the answer's tokens where the reference has the same first choice
    bytes_f16: int = 0
    bytes_now: int = 0
    n_slots: list[int] = field(default_factory=lambda: [0, 0])
    seconds: float = 0.0

    @property
    def kv_ratio(self) -> float:
        return 1 - self.bytes_now / self.bytes_f16 if self.bytes_f16 else 0.0


@dataclass
class Evaluation:
    model: str
    settings: list[Measured]
    task: list[str] = field(default_factory=list)  # of each question
    picture: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # of each answer
    n_vision: int = 0  # tokens of a picture

    def add(self, number: int, seen: Seen) -> None:
        self.task += seen.task
        self.picture += [number] * len(seen.task)
        self.tokens += seen.tokens
        self.n_vision = seen.n_vision
        for measured, x in zip(self.settings, seen.settings, strict=True):
            measured.kld += x.kld
            measured.exact += x.exact
            measured.agree += x.agree
            measured.bytes_f16 += x.bytes_f16
            measured.bytes_now += x.bytes_now
            measured.n_slots = [a + b for a, b in zip(measured.n_slots, x.n_slots)]
            measured.seconds += x.seconds


@dataclass
class SeenBy:
    """One picture with one setting: as in Measured."""

    kld: list[float]
    exact: list[bool]
    agree: list[float]
    bytes_f16: int
    bytes_now: int
    n_slots: Sequence[int]
    seconds: float


@dataclass
class Seen:
    """One picture with all settings."""

    task: list[str]
    tokens: list[int]
    n_vision: int
    settings: list[SeenBy]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def score(logits: np.ndarray, reference: np.ndarray, answer: list[int]) -> tuple[float, bool, float]:
    """(KLD, exact match, agreement) of an answer's logits. Forced with the answer, every first choice right = greedy decoding writes it."""
    p, q = log_softmax(reference), log_softmax(logits)
    kld = float((np.exp(p) * (p - q)).sum(-1).mean())
    first = logits.argmax(-1)
    return kld, bool((first == np.array(answer)).all()), float((first == reference.argmax(-1)).mean())


def evaluate(
    vlm: Vlm, samples: Iterable[Sample], settings: list[Setting], *, n_ctx: int = 1024, max_questions: int = 16, flash_attn: bool = True,
    journal: Path | None = None, keep: bool = True, progress: Callable[[Evaluation], None] = lambda _: None,
) -> Evaluation:
    """The first setting is the reference. journal: a file with a line for every picture; those that are there already are not measured again.
    keep: the contexts of all settings live together; otherwise one after the other, for models whose caches are large."""
    prompts = Prompts(vlm)
    result = Evaluation(vlm.path.stem, [Measured(s) for s in settings])
    with _Journal(journal, settings) as done, _caches(vlm, settings, n_ctx, max_questions, flash_attn, keep) as caches:
        for number, sample in enumerate(samples):
            if (seen := done.get(number, sample)) is not None:
                result.add(number, seen)
                continue
            picture = vlm.read(prompts.before(), sample.picture)
            try:
                seen = _picture(caches(), picture, prompts, sample.questions)
            finally:
                picture.free()
            done.put(number, sample, seen)
            result.add(number, seen)
            progress(result)
    return result


@contextmanager
def _caches(vlm: Vlm, settings: list[Setting], n_ctx: int, max_questions: int, flash_attn: bool, keep: bool) -> Iterator[Callable[[], Iterator[Cache]]]:
    """A function that gives the contexts in the order of the settings."""
    kept: list[Cache] = []

    def one_by_one() -> Iterator[Cache]:
        for setting in settings:
            cache = Cache(vlm, setting, n_ctx, max_questions, flash_attn)
            try:
                yield cache
            finally:
                cache.close()

    def all_of_them() -> Iterator[Cache]:
        while len(kept) < len(settings):
            kept.append(Cache(vlm, settings[len(kept)], n_ctx, max_questions, flash_attn))
        return iter(kept)

    try:
        yield all_of_them if keep else one_by_one
    finally:
        for cache in kept:
            cache.close()


def _picture(caches: Iterable[Cache], picture: Picture, prompts: Prompts, questions: list[Asked]) -> Seen:
    asked: list[tuple[list[int], int]] = []
    reference: list[np.ndarray] = []
    found = []
    for cache in caches:
        start = time.monotonic()
        use = cache.show(picture)
        asked = asked or [_forced(prompts, cache, q) for q in questions]
        logits = cache.ask(asked)
        seconds = time.monotonic() - start
        reference = reference or logits
        scores = [score(ours, truth, tokens[-n:]) for (tokens, n), ours, truth in zip(asked, logits, reference)]
        kld, exact, agree = (list(x) for x in zip(*scores))
        found.append(SeenBy(kld, exact, agree, use.bytes_f16, use.bytes_now, list(use.n_slots), seconds))
    return Seen([q.task for q in questions], [n for _, n in asked], picture.n_vision, found)


def _forced(prompts: Prompts, reference: Cache, question: Asked) -> tuple[list[int], int]:
    if question.answer is not None:
        forced = prompts.forced(question.prompt, question.answer)
        return forced.tokens, forced.n_answer
    tokens = prompts.question(question.prompt)
    answer = reference.write(tokens, MAX_WRITTEN)
    return [*tokens, *answer], len(answer)


class _Journal:
    """Results of pictures, a JSON line each, so that a long run can be interrupted; a line that was not finished counts for nothing."""

    def __init__(self, path: Path | None, settings: list[Setting]) -> None:
        self.path, self.file = path, None
        self.settings = [_identity(s) for s in settings]
        self.lines: dict[int, dict] = {}

    def __enter__(self) -> _Journal:
        if self.path is None:
            return self
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["settings"] != self.settings:
                raise EvalError(f"{self.path} is of a run with other settings: repeat them to go on, or delete the file")
            self.lines[entry["number"]] = entry
        self.file = self.path.open("a")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.file:
            self.file.close()

    def get(self, number: int, sample: Sample) -> Seen | None:
        entry = self.lines.get(number)
        if entry is None or (entry["name"], entry["prompts"]) != (sample.name, [q.prompt for q in sample.questions]):
            return None
        seen = entry["seen"]
        return Seen(**{**seen, "settings": [SeenBy(**x) for x in seen["settings"]]})

    def put(self, number: int, sample: Sample, seen: Seen) -> None:
        if self.file:
            entry = {"number": number, "name": sample.name, "prompts": [q.prompt for q in sample.questions], "settings": self.settings, "seen": asdict(seen)}
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()


def _identity(setting: Setting) -> list:
    """What distinguishes a setting, its capsule file included."""
    content = hashlib.sha256(setting.capsule.read_bytes()).hexdigest() if setting.capsule else ""
    return [setting.name, setting.ratio, setting.guard, content]
