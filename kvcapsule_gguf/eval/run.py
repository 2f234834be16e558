"""The measurement: every setting sees the same pictures and the same forced answers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .cache import Cache, Shown
from .journal import Journal, Seen, SeenBy
from .prompts import Prompts
from .samples import Asked, Sample
from .settings import Setting
from .vlm import Picture, Vlm

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
    slots: Counter[str] = field(default_factory=Counter)  # of each tier
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
    n_vision: list[int] = field(default_factory=list)  # tokens of each picture

    def add(self, number: int, seen: Seen) -> None:
        self.task += seen.task
        self.picture += [number] * len(seen.task)
        self.tokens += seen.tokens
        self.n_vision.append(seen.n_vision)
        for measured in self.settings:
            x = seen.settings[measured.setting]
            measured.kld += x.kld
            measured.exact += x.exact
            measured.agree += x.agree
            measured.bytes_f16 += x.bytes_f16
            measured.bytes_now += x.bytes_now
            measured.slots.update(x.slots)
            measured.seconds += x.seconds


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
    vlm: Vlm, samples: Iterable[Sample], settings: list[Setting], *, n_ctx: int = 1024, max_questions: int = 16, flash_attn: bool = True, max_written: int = MAX_WRITTEN,
    journal: Path | None = None, keep: bool = True, progress: Callable[[Evaluation, int], None] = lambda result, before: None,
) -> Evaluation:
    """The first setting is the reference. journal: a file with what was measured of every picture; that is not measured again, other settings may come later.
    keep: the contexts of all settings live together; otherwise one after the other, for models whose caches are large.
    progress: called after each picture that is measured now, with the number of questions that the journal had."""
    prompts, before = Prompts(vlm), 0
    result = Evaluation(vlm.path.stem, [Measured(s) for s in settings])
    with Journal(journal, vlm.path, settings, (n_ctx, flash_attn)) as done, _caches(vlm, n_ctx, max_questions, flash_attn, keep) as caches:
        for number, sample in enumerate(samples):
            missing = done.missing(sample)
            if missing:
                picture = vlm.read(prompts.before(), *sample.pictures)
                try:
                    # the reference comes first in any case: the others are compared with it
                    done.put(sample, _picture(caches([settings[0], *(s for s in missing if s is not settings[0])]), picture, prompts, sample.questions, max_written))
                finally:
                    picture.free()
            result.add(number, done.get(sample))
            if missing:
                progress(result, before)
            else:
                before += len(sample.questions)
    return result


@contextmanager
def _caches(vlm: Vlm, n_ctx: int, max_questions: int, flash_attn: bool, keep: bool) -> Iterator[Callable[[list[Setting]], Iterator[Cache]]]:
    """A function that gives the contexts of settings in their order."""
    kept: dict[Setting, Cache] = {}

    def one_by_one(settings: list[Setting]) -> Iterator[Cache]:
        for setting in settings:
            cache = Cache(vlm, setting, n_ctx, max_questions, flash_attn)
            try:
                yield cache
            finally:
                cache.close()

    def all_of_them(settings: list[Setting]) -> Iterator[Cache]:
        for setting in settings:
            if setting not in kept:
                kept[setting] = Cache(vlm, setting, n_ctx, max_questions, flash_attn)
            yield kept[setting]

    try:
        yield all_of_them if keep else one_by_one
    finally:
        for cache in kept.values():
            cache.close()


def _picture(caches: Iterable[Cache], picture: Picture, prompts: Prompts, questions: list[Asked], max_written: int) -> Seen:
    shown: dict[tuple[Path | None, str], Shown] = {}
    asked: list[tuple[list[int], int]] = []
    reference: list[np.ndarray] = []
    found: dict[Setting, SeenBy] = {}
    for cache in caches:
        start = time.monotonic()
        use = cache.show(picture, shown)
        asked = asked or [_forced(prompts, cache, q, max_written) for q in questions]
        logits = cache.ask(asked)
        seconds = time.monotonic() - start
        reference = reference or logits
        scores = [score(ours, truth, tokens[-n:]) for (tokens, n), ours, truth in zip(asked, logits, reference)]
        kld, exact, agree = (list(x) for x in zip(*scores))
        found[cache.setting] = SeenBy(kld, exact, agree, use.bytes_f16, use.bytes_now, use.slots, seconds)
    return Seen([q.task for q in questions], [n for _, n in asked], picture.n_vision, found)


def _forced(prompts: Prompts, reference: Cache, question: Asked, max_written: int) -> tuple[list[int], int]:
    if question.answer is not None:
        forced = prompts.forced(question.prompt, question.answer)
        return forced.tokens, forced.n_answer
    tokens = prompts.question(question.prompt)
    answer = reference.write(tokens, max_written)
    return [*tokens, *answer], len(answer)
