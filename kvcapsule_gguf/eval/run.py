"""The measurement: every setting sees the same pictures and the same forced answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from .prompts import Prompts
from .settings import Setting
from .suites import Asked, Sample
from .vlm import Cache, Picture, Vlm

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
    n_vision: int = 0  # tokens of a picture


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
    progress: Callable[[Evaluation], None] = lambda _: None,
) -> Evaluation:
    """The first setting is the reference."""
    prompts = Prompts(vlm)
    result = Evaluation(vlm.path.stem, [Measured(s) for s in settings])
    caches: list[Cache] = []
    try:
        caches = [Cache(vlm, s, n_ctx, max_questions, flash_attn) for s in settings]
        for number, sample in enumerate(samples):
            picture = vlm.read(prompts.before(), sample.picture)
            try:
                _picture(result, caches, picture, prompts, sample.questions, number)
            finally:
                picture.free()
            progress(result)
    finally:
        for cache in caches:
            cache.close()
    return result


def _picture(result: Evaluation, caches: list[Cache], picture: Picture, prompts: Prompts, questions: list[Asked], number: int) -> None:
    asked: list[tuple[list[int], int]] = []
    reference: list[np.ndarray] = []
    for measured, cache in zip(result.settings, caches):
        start = time.monotonic()
        use = cache.show(picture)
        asked = asked or [_forced(prompts, cache, q) for q in questions]
        logits = cache.ask(asked)
        measured.seconds += time.monotonic() - start
        reference = reference or logits
        measured.bytes_f16 += use.bytes_f16
        measured.bytes_now += use.bytes_now
        measured.n_slots = [a + b for a, b in zip(measured.n_slots, use.n_slots)]
        for (tokens, n), ours, truth in zip(asked, logits, reference):
            kld, exact, agree = score(ours, truth, tokens[-n:])
            measured.kld.append(kld)
            measured.exact.append(exact)
            measured.agree.append(agree)
    result.task += [q.task for q in questions]
    result.picture += [number] * len(questions)
    result.n_vision = picture.n_vision


def _forced(prompts: Prompts, reference: Cache, question: Asked) -> tuple[list[int], int]:
    if question.answer is not None:
        forced = prompts.forced(question.prompt, question.answer)
        return forced.tokens, forced.n_answer
    tokens = prompts.question(question.prompt)
    answer = reference.write(tokens, MAX_WRITTEN)
    return [*tokens, *answer], len(answer)
