"""Tables of bits fitted to coded pictures: one for every head, for every layer, or for the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..codec.allocate import allocate
from ..codec.builtin import MORE, builtin_bits, builtin_table
from ..format.base_model import BaseModel
from .coded import KINDS, Coded, costs, groups_of

Tables = dict[tuple[str, int], np.ndarray]
KEYS = 2  # an error of keys counts so many times (docs/reference/format-v2.md)


def fit_tables(coded: Coded, bits: Sequence[float], scope: str = "head", groups: str = "group", per_layer: bool = False, types: Sequence[int] | None = None,
               shares: Sequence[float] | None = None,
               weight: dict[tuple[str, int], float] | None = None) -> list[Tables]:
    """One set of tables for each mean number of bits (scales included).

    scope: head, layer (the heads of a layer share), model (all layers share). groups: group, or row (all groups share).
    per_layer: every layer gets the same bytes; otherwise bytes go where they take most error away, relative to the energy of its layer around the mean.
    shares: of each layer, around 1, with per_layer. types: those that may be used. weight: of the errors of a kind in a layer (None: KEYS for keys, 1 for values).
    """
    layers = range(len(coded.model.kv_layers))
    keys = [(kind, i) for i in layers for kind in KINDS]
    errors = {x: coded.relative(*x) * (weight[x] if weight else KEYS if x[0] == "k" else 1) for x in keys}
    if types is not None:
        banned = [t for t, b in enumerate(coded.types) if b not in types]
        for e in errors.values():
            e[..., banned] = np.inf
    cost = {x: costs(coded.types, groups_of(coded.model, *x), coded.lengths) for x in keys}
    out: list[Tables] = [{} for _ in bits]
    parts = [[("k", i), ("v", i)] for i in layers] if per_layer else [keys]
    for part, share in zip(parts, shares or [1.0] * len(parts)):
        shape = {x: errors[x].shape for x in part}
        if scope == "model":  # all layers of a kind share
            units = [[x for x in part if x[0] == kind] for kind in KINDS]
        else:
            units = [[x] for x in part]
        stacks, weights = [], []
        for members in units:
            e = np.sum([errors[x] for x in members], 0)  # [H, 33, G, types]
            c = np.broadcast_to(sum(cost[x] for x in members), e.shape)
            if scope != "head":
                e, c = e.sum(0, keepdims=True), c.sum(0, keepdims=True)
            if groups == "row":
                e, c = e.sum(2, keepdims=True), c.sum(2, keepdims=True)
            stacks.append(e)
            weights.append(c)
        flat_e, flat_c = (np.concatenate([x.reshape(-1, x.shape[-1]) for x in s]) for s in (stacks, weights))
        total = sum(shape[x][0] * coded.n * sum(g.size for g in groups_of(coded.model, *x)) for x in part)
        for found, b in zip(out, bits):
            pick = allocate(flat_e, flat_c, b * share * total)
            at = 0
            for members, e in zip(units, stacks):
                n = int(np.prod(e.shape[:-1]))
                t = np.asarray(coded.types)[pick[at : at + n]].reshape(e.shape[:-1])
                at += n
                for x in members:
                    found[x] = np.broadcast_to(t, shape[x][:-1]).copy()
    return out


def builtin_tables(model: BaseModel, smaller: float, more: float = MORE) -> Tables:
    """The tables that need no file. more: another one than the format's is for the study only."""
    out = {}
    for i, layer in enumerate(model.kv_layers):
        for kind in KINDS:
            table = builtin_table(builtin_bits(smaller, kind, more), len(groups_of(model, kind, i)))
            out[kind, i] = np.repeat(table[None], model.head_count_kv[layer], 0)
    return out
