"""The projector: two layers with GELU (tanh), as llama.cpp's projector type `mlp` computes them, and its start in closed form."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .decoder import Decoder
from .features import Features

HIDDEN = 1024
NORM = 3.15  # of a word's embedding, in the median


def project(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    """[..., 384] -> [..., 576]."""
    return F.linear(F.gelu(F.linear(x, p["mm0"], p["mm0b"]), approximate="tanh"), p["mm2"], p["mm2b"])


def closed_form(features: Features, decoder: Decoder, tokenize, say=print) -> dict[str, torch.Tensor]:
    """Random features of the patches, ridge regression to the embeddings of the words for what a patch shows."""
    table: dict[str, torch.Tensor] = {}
    def word(text: str) -> torch.Tensor:
        if text not in table:
            table[text] = decoder.embed(torch.tensor(tokenize(f" {text}"))).mean(0)
        return table[text]

    xs, ys, weights, nouns = [], [], [], []
    for i, picture in enumerate(features.pictures):
        names = picture.lines or [f"{p.thing.colour} {p.thing.noun}".strip() for p in picture.placed]
        target = {n: word(name) for n, name in enumerate(names)}
        target[-1] = word("text" if picture.kind == "page" else "background")
        target[-2] = torch.stack([target[n] for n in target]).mean(0)
        labels = features.labels(i)
        keep = (labels != -1) | (np.arange(256) % 4 == 0)
        xs.append(features[i][keep])
        ys.append(torch.stack([target[n] for n in labels[keep]]))
        nouns += [names[n] if n >= 0 else "" for n in labels[keep]]
    x, y = torch.cat(xs), torch.cat(ys)
    mean, std = x.mean(0), x.std(0) + 1e-3
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(HIDDEN, x.shape[1], generator=rng) * 1.5 / x.shape[1]**0.5
    b = torch.randn(HIDDEN, generator=rng) * 0.3
    z = torch.cat([F.gelu(F.linear((x - mean) / std, w, b), approximate="tanh"), torch.ones(len(x), 1)], 1)
    gram = z.T @ z
    solved = torch.linalg.solve(gram + 3e-3 * gram.diagonal().mean() * torch.eye(HIDDEN + 1), z.T @ y)
    got = z @ solved
    scale = NORM / got.norm(dim=-1).median()
    names = sorted(set(nouns) - {""})
    near = F.normalize(got, dim=-1) @ F.normalize(torch.stack([table[n] for n in names]), dim=-1).T
    right = [names[n] == noun for n, noun in zip(near.argmax(-1).tolist(), nouns) if noun]
    say(f"closed form: {len(x)} tokens of {len(features)} pictures; the nearest of {len(names)} names is right on {np.mean(right):.3f}")
    p = {"mm0": w / std, "mm0b": b - (w / std) @ mean, "mm2": solved[:-1].T.contiguous() * scale, "mm2b": solved[-1] * scale}
    return with_places(p, features, decoder, tokenize, say)


def with_places(p: dict[str, torch.Tensor], features: Features, decoder: Decoder, tokenize, say=print, pictures: int = 96) -> dict[str, torch.Tensor]:
    """The projector that also says where a token lies: from left to right along the difference of these words, from top to bottom likewise, each of length 1."""
    def word(text: str) -> torch.Tensor:
        return decoder.embed(torch.tensor(tokenize(f" {text}"))).mean(0)

    ways = F.normalize(torch.stack([word("right") - word("left"), word("bottom") - word("top")]), dim=-1)
    x = torch.cat([features[i][:-1] for i in range(min(pictures, len(features)))])
    patch = torch.arange(1, 256).repeat(len(x) // 255)
    place = torch.stack([patch % 16, patch // 16], -1) / 7.5 - 1
    z = torch.cat([F.gelu(F.linear(x, p["mm0"], p["mm0b"]), approximate="tanh"), torch.ones(len(x), 1)], 1)
    gram = z.T @ z
    solved = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(gram.shape[0]), z.T @ place)
    say(f"places: {1 - ((z @ solved - place).var() / place.var()):.3f} of the variance explained")
    return p | {"mm2": p["mm2"] + ways.T @ solved[:-1].T, "mm2b": p["mm2b"] + solved[-1] @ ways}
