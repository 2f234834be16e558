"""Pictures coded in means and axes that were fitted to the other pictures: tables made from these errors do not trust the axes more than a new picture lets them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np

from ..codec.builtin import SMALLER as BUILTIN
from ..codec.quality import QUALITY, choose
from ..format.base_model import BaseModel
from .coded import TYPES, Coded, energy_of, fit_basis, quality_scores, table_bits, tiles_of
from .source import KVSample
from .tables import Tables, builtin_tables

FOLDS = 4


def axes_for(samples: Sequence[KVSample]) -> str:
    """None from a single picture: its values fit their own axes so well that the tables give them almost no bits (KLD 68 to 231 times that of q4_0)."""
    return "full" if len(samples) > 1 else "none"


def cross_coded(model: BaseModel, samples: Sequence[KVSample], types: Sequence[int] = TYPES, basis: dict | None = None, **options: Any) -> Coded:
    """Errors only, in axes as `axes_for` says. Every sample has a whole tile. basis: other options of fit_basis, options: of Coded (the study's)."""
    fitted = {"v_axes": axes_for(samples), **(basis or {})}
    folds = min(FOLDS, len(samples))
    parts = []
    for fold in range(folds):
        others = [s for n, s in enumerate(samples) if n % folds != fold or folds == 1]
        parts.append(Coded(model, samples[fold::folds], fit_basis(others, model, **fitted), types=tuple(types), keep=False, **options))
    whole = copy(parts[0])
    whole.samples = [s for p in parts for s in p.samples]
    whole.errors, whole.rival = ({x: np.concatenate([getattr(p, name)[x] for p in parts]) for x in parts[0].errors} for name in ("errors", "rival"))
    whole.energy = {(kind, i): energy_of(tiles_of(whole.samples, kind, i, whole.shape)) for kind, i in parts[0].errors}
    return whole


def sizes(coded: Coded, tiers: Sequence[Tables]) -> tuple[float, float]:
    """How many times smaller these pictures get at the default quality: with the tables, and with the built-in ones, which have no mean and no axes."""
    plain = Coded(coded.model, coded.samples, fit_basis(coded.samples[:1], coded.model, mean=False, v_axes="none"), types=coded.types, keep=False)
    builtin = [builtin_tables(coded.model, x) for x in BUILTIN]
    return _smaller(coded, tiers, coded.energy, QUALITY), _smaller(plain, builtin, coded.energy, QUALITY)


def _smaller(coded: Coded, tiers: Sequence[Tables], energy: dict[tuple[str, int], float], quality: float) -> float:
    pick = choose(np.stack([quality_scores(coded, t, energy) for t in tiers]), quality)
    bits = np.array([*(table_bits(t, coded.groups) for t in tiers), 16.0])  # -1: the tile stays as it is
    return float(16 / bits[pick].mean())
