"""The projector: two layers with GELU (tanh), as llama.cpp's projector type `mlp` computes them, and how it starts."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from . import things
from .decoder import Decoder
from .features import Features
from .pictures import Picture

HIDDEN = 1024
NORM = 3.15  # of a word's embedding, in the median


def project(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    """[..., 384] -> [..., 576]."""
    return F.linear(F.gelu(F.linear(x, p["mm0"], p["mm0b"]), approximate="tanh"), p["mm2"], p["mm2b"])


class Names:
    """What a patch can show, each with the mean embedding of its words."""

    def __init__(self, decoder: Decoder, tokenize, nouns: list[str]) -> None:
        shapes = [f"{colour} {shape}" for colour in things.COLOURS for shape in things.SHAPES]
        self.names = sorted({*nouns, *shapes, *things.WORDS, "background", "text"} - set(things.SHAPES))
        self.number = {name: i for i, name in enumerate(self.names)}
        self.embedding = torch.stack([decoder.embed(torch.tensor(tokenize(f" {name}"))).mean(0) for name in self.names])
        self.direction = F.normalize(self.embedding, dim=-1)
        self.right = decoder.embed(torch.tensor(tokenize(" right"))).mean(0) - decoder.embed(torch.tensor(tokenize(" left"))).mean(0)
        self.down = decoder.embed(torch.tensor(tokenize(" bottom"))).mean(0) - decoder.embed(torch.tensor(tokenize(" top"))).mean(0)

    def of(self, picture: Picture, labels: np.ndarray) -> np.ndarray:
        """Numbers of names for the labels of a picture's tokens (Features.labels); -1 for the class token."""
        shown = picture.lines or [f"{p.thing.colour} {p.thing.noun}".strip() for p in picture.placed]
        table = [self.number[name] for name in shown] + [-1, self.number["text" if picture.kind == "page" else "background"]]
        return np.array(table)[labels]

    def loss(self, image: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Cross entropy of projected tokens [n, 576]: each should be nearest to its name."""
        named = numbers >= 0
        return F.cross_entropy(20 * F.normalize(image[named], dim=-1) @ self.direction.T, numbers[named])


def shown(features: Features, names: Names, every: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches [n, 384] with the numbers of what they show; of background, one in `every`."""
    xs, ys = [], []
    for i, picture in enumerate(features.pictures):
        labels = features.labels(i)
        keep = (labels >= 0) | ((labels == -1) & (np.arange(256) % every == 0))
        xs.append(features[i][keep])
        ys.append(torch.from_numpy(names.of(picture, labels[keep])))
    return torch.cat(xs), torch.cat(ys)


def start(features: Features, names: Names, say=print, steps: int = 400) -> dict[str, torch.Tensor]:
    """Random features of the patches and ridge regression to the embeddings of names; then names are told apart, and places are added. One minute."""
    x, y = shown(features, names)
    mean, std = x.mean(0), x.std(0) + 1e-3
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(HIDDEN, x.shape[1], generator=rng) * 1.5 / x.shape[1]**0.5
    b = torch.randn(HIDDEN, generator=rng) * 0.3
    p = {"mm0": w / std, "mm0b": b - (w / std) @ mean, "mm2": torch.zeros(names.embedding.shape[1], HIDDEN), "mm2b": torch.zeros(names.embedding.shape[1])}
    _solve(p, x, names.embedding[y], 3e-3)
    for v in p.values():
        v.requires_grad_()
    optimizer = torch.optim.AdamW([{"params": [p["mm0"], p["mm0b"]], "lr": 3e-4}, {"params": [p["mm2"], p["mm2b"]], "lr": 1e-3}], weight_decay=0.01)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, (3e-4, 1e-3)):
            group["lr"] = rate * (1 - step / steps)
        some = torch.randint(0, len(x), (1024,), generator=rng)
        noisy = x[some] + 0.2 * std * torch.randn(len(some), x.shape[1], generator=rng)
        names.loss(project(noisy, p), y[some]).backward()
        optimizer.step()
        optimizer.zero_grad()
    p = {k: v.detach() for k, v in p.items()}
    scale = NORM / project(x[::10], p).norm(dim=-1).median()
    p |= {"mm2": p["mm2"] * scale, "mm2b": p["mm2b"] * scale}
    right = (F.normalize(project(x[::10], p), dim=-1) @ names.direction.T).argmax(-1) == y[::10]
    say(f"start: {len(x)} patches of {len(features)} pictures; the nearest of {len(names.names)} names is right on {right.float().mean():.3f}")
    return with_places(p, features, names, say)


def with_places(p: dict[str, torch.Tensor], features: Features, names: Names, say=print, pictures: int = 96) -> dict[str, torch.Tensor]:
    """The projector that also says where a token lies: along right - left and bottom - top, by at most 1 each."""
    ways = F.normalize(torch.stack([names.right, names.down]), dim=-1)
    x = torch.cat([features[i][:-1] for i in range(min(pictures, len(features)))])
    patch = torch.arange(1, 256).repeat(len(x) // 255)
    place = torch.stack([patch % 16, patch // 16], -1) / 7.5 - 1
    q = dict(p)
    _solve(q, x, place, 1e-3)
    say(f"places: {1 - (project(x, q) - place).var() / place.var():.3f} of the variance explained")
    return p | {"mm2": p["mm2"] + ways.T @ q["mm2"], "mm2b": p["mm2b"] + q["mm2b"] @ ways}


def _solve(p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, ridge: float) -> None:
    """The second layer by ridge regression, given the first."""
    z = torch.cat([F.gelu(F.linear(x, p["mm0"], p["mm0b"]), approximate="tanh"), torch.ones(len(x), 1)], 1)
    gram = z.T @ z
    solved = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)), z.T @ y)
    p["mm2"], p["mm2b"] = solved[:-1].T.contiguous(), solved[-1]
