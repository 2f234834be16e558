"""What a stored picture does to answers: the KL divergence of forced answers from those with an exact cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .decoder import Cache, Decoder, Shown, Store
from .pictures import Asked

# what becomes of the exact cache of picture number n
Change = Callable[[int, Cache], Cache]


@dataclass
class Answers:
    """Per picture: the exact cache, and per question its tokens, how many of them are the answer, and the log-probabilities [n, vocab] of these."""

    decoder: Decoder
    caches: list[Cache]
    questions: list[list[tuple[list[int], int, torch.Tensor]]]

    @classmethod
    def of(cls, decoder: Decoder, asked: Sequence[Asked], per_picture: int = 3, written: int = 12) -> Answers:
        """written: tokens of an answer that the model writes itself, where none is given."""
        caches, questions = [], []
        for a in asked:
            cache = decoder.show(Shown(a.before, a.embd, a.width))
            found = []
            for tokens, n in a.questions[:per_picture]:
                if not n:
                    tokens, n = _write(decoder, cache, tokens, written), written
                found.append((tokens, n, _answer(decoder, decoder.fork(cache), tokens, n)))
            caches.append(cache)
            questions.append(found)
        return cls(decoder, caches, questions)

    def divergence(self, change: Change) -> tuple[np.ndarray, np.ndarray]:
        """f64 [pictures]: the mean KL divergence over the tokens of the answers, and the share of them whose likeliest token changed."""
        kld, flips = [], []
        for n, (cache, questions) in enumerate(zip(self.caches, self.questions)):
            changed = change(n, cache)
            each, turned = [], []
            for tokens, count, exact in questions:
                got = _answer(self.decoder, self.decoder.fork(changed), tokens, count)
                each.append((exact.exp() * (exact - got)).sum(-1).double().numpy())
                turned.append((exact.argmax(-1) != got.argmax(-1)).numpy())
            kld.append(np.concatenate(each).mean())
            flips.append(np.concatenate(turned).mean())
        return np.array(kld), np.array(flips)


def picture_only(store: Callable[[int], Store]) -> Change:
    """The picture's keys and values as store(n) reads them; text stays exact."""
    return lambda n, cache: Decoder.fork(cache, store(n))


def _answer(decoder: Decoder, cache: Cache, tokens: Sequence[int], n: int) -> torch.Tensor:
    return F.log_softmax(decoder.text(cache, tokens)[-n - 1 : -1], -1)


def _write(decoder: Decoder, cache: Cache, question: list[int], n: int) -> list[int]:
    state, tokens = decoder.fork(cache), list(question)
    logits = decoder.text(state, tokens)
    for _ in range(n):
        tokens.append(int(logits[-1].argmax()))
        logits = decoder.text(state, tokens[-1:])
    return tokens


def paired(a: np.ndarray, b: np.ndarray, rounds: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """mean(a) / mean(b) over the same pictures, and its 95 % interval by bootstrap over pictures."""
    pick = np.random.default_rng(seed).integers(0, len(a), (rounds, len(a)))
    ratio = a[pick].mean(1) / b[pick].mean(1)
    return float(a.mean() / b.mean()), *(float(x) for x in np.quantile(ratio, (0.025, 0.975)))
