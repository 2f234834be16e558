"""What a stored picture does to answers: the KL divergence of forced answers from those with an exact cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..train.source import KVSample
from .decoder import Cache, Decoder, Shown, Store
from .pictures import Asked

# what becomes of the exact cache of picture number n
Change = Callable[[int, Cache], Cache]


@dataclass
class Answers:
    """Per picture: the exact cache, the questions (tokens, how many of them are the answer), and the log-probabilities [answer tokens, vocab]."""

    decoder: Decoder
    caches: list[Cache]
    questions: list[list[tuple[list[int], int]]]
    exact: list[torch.Tensor]

    @classmethod
    def of(cls, decoder: Decoder, asked: Sequence[Asked], per_picture: int = 3, written: int = 12) -> Answers:
        """written: tokens of an answer that the model writes itself, where none is given."""
        caches, questions, exact = [], [], []
        for a in asked:
            cache = decoder.show(Shown(a.before, a.embd, a.width))
            texts = [(list(tokens), n) for tokens, n in a.questions[:per_picture]]
            open_ended = [i for i, (_, n) in enumerate(texts) if not n]
            for i, tokens in zip(open_ended, _write(decoder, cache, [texts[i][0] for i in open_ended], written)):
                texts[i] = tokens, written
            caches.append(cache)
            questions.append(texts)
            exact.append(_answers(decoder, cache, texts))
        return cls(decoder, caches, questions, exact)

    def divergence(self, change: Change) -> tuple[np.ndarray, np.ndarray]:
        """f64 [pictures]: the mean KL divergence over the tokens of the answers, and the share of them whose likeliest token changed."""
        kld, flips = [], []
        for n, (cache, texts, exact) in enumerate(zip(self.caches, self.questions, self.exact)):
            got = _answers(self.decoder, change(n, cache), texts)
            kld.append(float((exact.exp() * (exact - got)).sum(-1).double().mean()))
            flips.append(float((exact.argmax(-1) != got.argmax(-1)).double().mean()))
        return np.array(kld), np.array(flips)


    def changed(self, change: Change) -> Answers:
        """The same questions about pictures whose exact keys and values are others."""
        caches = [change(n, cache) for n, cache in enumerate(self.caches)]
        return Answers(self.decoder, caches, self.questions, [_answers(self.decoder, c, t) for c, t in zip(caches, self.questions)])

    def samples(self) -> list[KVSample]:
        """Keys and values of the pictures, and the queries of the questions."""
        return [self.decoder.sample(c, [tokens for tokens, _ in t]) for c, t in zip(self.caches, self.questions)]


def picture_only(store: Callable[[int], Store]) -> Change:
    """The picture's keys and values as store(n) reads them; text stays exact."""
    return lambda n, cache: Decoder.fork(cache, store(n))


def _answers(decoder: Decoder, cache: Cache, texts: Sequence[tuple[Sequence[int], int]]) -> torch.Tensor:
    """Log-probabilities [answer tokens of all texts, vocab]."""
    states = decoder.branches(cache, [tokens for tokens, _ in texts])
    return F.log_softmax(F.linear(torch.cat([h[-n - 1 : -1] for h, (_, n) in zip(states, texts)]), decoder.output), -1)


def _write(decoder: Decoder, cache: Cache, questions: list[list[int]], n: int) -> list[list[int]]:
    """The questions, each with the n likeliest next tokens one after the other."""
    texts = [list(q) for q in questions]
    for _ in range(n if texts else 0):
        last = torch.stack([h[-1] for h in decoder.branches(cache, texts)])
        for text, token in zip(texts, F.linear(last, decoder.output).argmax(-1).tolist()):
            text.append(token)
    return texts


def paired(a: np.ndarray, b: np.ndarray, rounds: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """mean(a) / mean(b) over the same pictures, and its 95 % interval by bootstrap over pictures."""
    pick = np.random.default_rng(seed).integers(0, len(a), (rounds, len(a)))
    ratio = a[pick].mean(1) / b[pick].mean(1)
    return float(a.mean() / b.mean()), *(float(x) for x in np.quantile(ratio, (0.025, 0.975)))


def typical(a: np.ndarray, b: np.ndarray) -> float:
    """The geometric mean of a / b over pictures: what a few of them with large divergences do not decide."""
    least = 1e-9
    return float(np.exp(np.mean(np.log(np.maximum(a, least) / np.maximum(b, least)))))
