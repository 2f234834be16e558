"""Rows of the training: pictures, and behind them their questions side by side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from . import questions, things
from .features import Features
from .projector import Names
from .questions import Question

TOKENS = 256  # of a picture
NOTHING = -1e4
# how often a question is asked that teaches little about what is where; these also stand behind the others, of which a row holds so many
SELDOM = {"how many": 0.5, "which of two": 0.25, "yes or no": 0.25}


class Text:
    """The texts around pictures and questions, as tokens."""

    BEFORE = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n"

    def __init__(self, tokenize) -> None:
        self.tokenize = lru_cache(100_000)(tokenize)
        self.before = self.tokenize(self.BEFORE)

    def question(self, text: str) -> list[int]:
        return self.tokenize(f"{text}<|im_end|>\n<|im_start|>assistant\n")

    def answer(self, text: str) -> list[int]:
        return self.tokenize(f"{text}<|im_end|>")


@dataclass
class Batch:
    """ids [B, N] (-1: a picture's token), pos [B, N], labels [B, N] (-100: none), bias [B, 1, N, before + N], real [B, N]: what does not just fill up a row;
    images: the rows for ids == -1, in order; names: what they show."""

    ids: torch.Tensor
    pos: torch.Tensor
    labels: torch.Tensor
    bias: torch.Tensor
    real: torch.Tensor
    images: torch.Tensor
    names: torch.Tensor | None
    asked: list[list[tuple[Question, int, int]]]  # per row: the question, where its answer starts and ends


def some_tokens(rng: np.random.Generator, n: int) -> np.ndarray:
    """n of the 256 tokens, one from each cell of the grid, in order; always the class token, which is the last."""
    rows, cols = {256: (16, 16), 64: (8, 8), 32: (4, 8), 16: (4, 4)}[n]
    h, w = 16 // rows, 16 // cols
    r = np.arange(rows)[:, None] * h + rng.integers(0, h, (rows, cols))
    c = np.arange(cols)[None] * w + rng.integers(0, w, (rows, cols))
    picked = np.sort((r * 16 + c).reshape(-1)) - 1  # patch 0 is not among the tokens
    return np.append(picked[picked >= 0], TOKENS - 1)


class Rows:
    """Makes batches. A row holds 1 to 4 pictures with `n` of their tokens; what is left out is made up for by weight in attention: log(256 / n)."""

    def __init__(self, features: Features, text: Text, nouns: list[str], names: Names | None = None) -> None:
        self.features, self.text, self.nouns, self.names = features, text, nouns, names

    def batch(self, rng: np.random.Generator, n_rows: int, n_questions: int = 5) -> Batch:
        rows = []
        for _ in range(n_rows):
            n = int(rng.choice([1, 2, 3, 4], p=[0.7, 0.18, 0.07, 0.05]))
            which = [self._picture(rng) for _ in range(n)]
            asked = self.ask(which, rng)
            some = [q for q in asked if rng.random() < SELDOM.get(q.task, 1)] or asked
            rows.append((which, sorted(some, key=lambda q: q.task in SELDOM)[:n_questions]))
        sizes = [32 if len(which) < 3 else 16 for which, _ in rows]
        return self.build(rng, rows, sizes)

    def _picture(self, rng: np.random.Generator) -> int:
        """Half of them are of the newest quarter, since pictures that were seen often are known by heart; words and pages come a quarter as often as there are."""
        n = len(self.features)
        while True:
            i = int(rng.integers(0 if rng.random() < 0.5 else 3 * n // 4, n))
            if self.features.pictures[i].kind == "things" or rng.random() < 0.25:
                return i

    def ask(self, which: list[int], rng: np.random.Generator) -> list[Question]:
        shown = [self.features.pictures[i] for i in which]
        return questions.about(shown[0], rng, self.nouns) if len(shown) == 1 else questions.between(shown, rng, self.nouns)

    def build(self, rng: np.random.Generator, rows: list[tuple[list[int], list[Question]]], sizes: list[int]) -> Batch:
        p = len(self.text.before)
        ids, pos, labels, owner, mass, images, spans, names = [], [], [], [], [], [], [], []
        for (which, asked), size in zip(rows, sizes):
            i_, p_, l_, o_, m_, s_ = [], [], [], [], [], []
            for k, picture in enumerate(which):
                chosen = some_tokens(rng, size)
                images.append(self.features[picture][chosen])
                if self.names:
                    names.append(self.names.of(self.features.pictures[picture], self.features.labels(picture)[chosen]))
                i_ += [-1] * len(chosen)
                p_ += (p + k * TOKENS + chosen).tolist()
                m_ += [float(np.log((TOKENS - 1) / (len(chosen) - 1)))] * (len(chosen) - 1) + [0.0]
            l_, o_ = [-100] * len(i_), [0] * len(i_)
            start = p + len(which) * TOKENS
            for k, q in enumerate(asked, 1):
                a, b = self.text.question(q.text), self.text.answer(q.answer)
                s_.append((q, len(i_) + len(a) - 1, len(i_) + len(a) - 1 + len(b)))
                i_ += a + b
                p_ += range(start, start + len(a) + len(b))
                l_ += [-100] * (len(a) - 1) + b + [-100]
                o_ += [k] * (len(a) + len(b))
                m_ += [0.0] * (len(a) + len(b))
            for out, row in zip((ids, pos, labels, owner, mass, spans), (i_, p_, l_, o_, m_, s_)):
                out.append(row)
        n = max(map(len, ids))
        def pad(rows_: list[list], value: float, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.tensor([r + [value] * (n - len(r)) for r in rows_], dtype=dtype)
        own = pad(owner, 99)
        seen = ((own[:, :, None] == own[:, None, :]) | (own[:, None, :] == 0)) & torch.ones(n, n, dtype=torch.bool).tril()
        bias = torch.where(seen, pad(mass, 0, torch.float32)[:, None, :], torch.tensor(NOTHING))
        bias.diagonal(dim1=1, dim2=2).zero_()
        bias = torch.cat([torch.zeros(len(ids), n, p), bias], -1)[:, None]
        return Batch(pad(ids, 0), pad(pos, 0), pad(labels, -100), bias, own < 99, torch.cat(images), torch.from_numpy(np.concatenate(names)) if names else None, spans)


def all_nouns(all_stamps: list[things.Thing]) -> list[str]:
    """What a question may name: the nouns that training sees, and the shapes."""
    return sorted({t.noun for t in things.known(all_stamps)[0]} | set(things.SHAPES))
