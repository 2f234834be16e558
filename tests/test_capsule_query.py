"""GGML_OP_CAPSULE with keys that are not rebuilt: queries in 8 bits meet the rows as they are stored. Against numpy, which rebuilds the keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from capsule_op import Data, Setting, run_attention
from test_capsule_op import BASE

from kvcapsule_gguf.codec.types import row_counts

EIGHT_BITS = 1e-2  # of values near 1; the largest of these cases is 0.006
EXACT = 2e-5

MIXED = (row_counts(q8_0=2, q4_0=6, q2_0=8), row_counts(q8_0=8, q4_0=8))
PCA = replace(BASE, rows_k=MIXED, rows_v=MIXED, query=True, tokens=1, terms=(12, 12, 0))  # the last pattern is rebuilt
ALL = replace(PCA, group=1, terms=(16, 16, 16))  # as many terms as tokens: exact
RETAIN = replace(BASE, rows_k=(row_counts(q8_0=6), row_counts(q4_0=6, q2_0=10)), rows_v=MIXED, retain=(True, True), kept=6, neighbours=2, query=True)

CASES = {
    "pca": PCA,
    "pca, as many terms as tokens": ALL,
    "pca, norm": replace(ALL, rope="norm"),
    "pca, part of the head": replace(ALL, n_rot=32),
    "pca, norm, part of the head": replace(ALL, n_rot=32, rope="norm"),
    "pca, no rope": replace(PCA, n_rot=0, tokens=3, terms=(0, 0, 0)),
    "pca, heads of 128": replace(ALL, d_k=128, d_v=128, n_rot=128),
    "pca, heads of 96, rotated by 32": replace(ALL, d_k=96, d_v=96, n_rot=96, rows_k=(row_counts(q8_0=4, q4_0=12),) * 2, rows_v=(row_counts(q8_0=16),) * 2),
    "pca, rotated q8_0 cache": replace(ALL, cache="q8_0", rotated=True),
    "pca, no rows": replace(ALL, rows_k=(row_counts(q8_0=0), MIXED[1])),
    "retain": RETAIN,
    "retain, norm": replace(RETAIN, rope="norm"),
    "retain, part of the head": replace(RETAIN, n_rot=32),
    "retain, no rope": replace(RETAIN, n_rot=0),
    "retain, one query": replace(RETAIN, tokens=1, group=1),
    "retain, 7 queries": replace(RETAIN, tokens=1, group=7),
    "retain, 8 tokens of 7 queries": replace(RETAIN, tokens=8, group=7),
    "retain, four neighbours": replace(RETAIN, neighbours=4, tokens=1),
    "retain and pca": replace(PCA, retain=(True, False), kept=6, neighbours=2, rows_k=(row_counts(q8_0=6), MIXED[0])),
    "sequences": replace(RETAIN, tokens=6, sequences=3, slots=(7, 4), ragged=0.5),
    "8 sequences": replace(RETAIN, tokens=8, group=1, sequences=8, slots=(13, 6)),
    "3 sequences, pca": replace(ALL, tokens=3, sequences=3, slots=(13, 6)),
}


def error(s: Setting, seed: int = 0) -> float:
    """The largest difference from numpy."""
    data = Data.of(replace(s, seed=seed))
    return float(np.abs(run_attention(data) - data.attention()).max())


@pytest.mark.parametrize("name", CASES)
def test_queries_meet_rows(name):
    found = [error(CASES[name], seed) for seed in range(3)]
    assert max(found) <= EIGHT_BITS
    assert max(found) > EXACT  # or else the keys were rebuilt


@pytest.mark.parametrize(
    "change",
    [{"mlp": 4, "retain": (True, True)}, {"terms": (0, 0, 0), "retain": (False, False)}, {"rows_k": (row_counts(f16=6, q8_0=2),) * 2}, {"query": False}],
    ids=["key MLP", "no terms", "f16 rows", "not asked for"],
)
def test_keys_that_are_rebuilt(change):
    assert error(replace(RETAIN, **change)) <= EXACT


def test_too_few_terms_are_seen():
    """Two terms for 16 tokens in a row with frequencies up to 1: the tolerance above is not blind."""
    assert error(replace(PCA, terms=(2, 2, 2))) > 5 * EIGHT_BITS


@pytest.mark.parametrize("s", [ALL, RETAIN], ids=["pca", "retain"])
def test_slots_that_begin_at_the_same_position_share_vectors(s):
    """Keys that are stored rotated all begin at 0; some have been moved since."""
    data = Data.of(replace(s, slots=(9, 5), parts=(1, 1)))
    data.first[:] = 0
    data.first[[4, 11]] = 3
    data.pattern[:7] = 1
    assert np.abs(run_attention(data) - data.attention()).max() <= EIGHT_BITS
    assert (run_attention(data) == run_attention(data, threads=3)).all()
