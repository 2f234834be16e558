"""The study's small version, on synthetic keys and values of a tiny model: what must hold for any smooth picture."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_kv import source

from kvcapsule_gguf.study.measure import Measure, rotated, with_outliers
from kvcapsule_gguf.study.ways import dct, ways


@pytest.fixture(scope="module")
def study(models):
    data = source(models(arch="llama"), 26)
    test = data.samples[24:]
    measures = {"like": Measure(data.model, test), "outliers": Measure(data.model, with_outliers(test))}
    return {way.name: (way, {name: m(way) for name, m in measures.items()}) for _, way in ways(data.model, data.samples[:24], small=True)}, measures


def test_the_order_of_the_ways(study):
    found, measures = study
    assert measures["like"].unit[0] > 0 and measures["like"](rotated("q8_0"))[0] < 0.05
    assert measures["like"].by_layer(rotated("q4_0")).mean(0) == pytest.approx(np.ones(3))
    error = {name: e["like"][0] for name, (_, e) in found.items()}
    assert error["pca, ratio 0.6"] < error["pca, ratio 0.8"]
    assert error["pca, ratio 0.8"] < error["f16 rows, the rest dropped"]  # grade, don't drop
    assert error["pca, ratio 0.8"] < error["all rows q2_0"] and error["all rows q4_0"] < error["all rows q2_0"]
    assert error["pca, ratio 0.8"] < error["DCT instead of a learned basis"]
    assert error["retain, 4 neighbours, gates only, residual"] < error["retain, 4 neighbours, gates only, no residual, q4_0"]


def test_equal_bytes_where_they_are_claimed(study):
    found, _ = study
    for name in ("pca, ratio 0.8", "pca, a basis for each head", "DCT instead of a learned basis", "pca, fitted with plain MSE", "pca, tiles of 8 x 8", "pca, N = 32"):
        assert found[name][0].bits() == pytest.approx(3.2, abs=0.12), name
    assert found["f16 rows, the rest dropped"][0].bits() == pytest.approx(3.2, abs=0.25)


def test_more_pictures_make_a_better_basis(study):
    found, _ = study
    few, more, all_of_them = (found[name][1]["like"][0] for name in ("pca, fitted to 8 pictures", "pca, fitted to 16 pictures", "pca, ratio 0.8"))
    assert few > more > all_of_them


def test_an_mlp_for_dropped_rows_changes_nothing_else(study):
    """Principal rows are uncorrelated: at the same bytes, with the same kept rows, a prediction of the dropped ones has little to find, and must not harm."""
    found, _ = study
    (plain, without), (predicted, guessed) = found["pca, ratio 0.875"], found["pca + MLP 32 for dropped key rows, ratio 0.875"]
    assert plain.bits() == predicted.bits() and plain.rows() == predicted.rows()
    assert guessed["like"][0] != without["like"][0] == pytest.approx(guessed["like"][0], rel=0.05) and guessed["like"][2] == without["like"][2]


def test_outliers_cost_a_prediction_more_than_a_codec(study):
    found, _ = study
    kept = found["retain, 4 neighbours, gates only, no residual, f16"][1]
    graded = found["pca, ratio 0.6"][1]
    assert graded["outliers"][0] < 1 < kept["outliers"][0]


def test_dct():
    assert np.allclose(dct(64) @ dct(64).T, np.eye(64), atol=1e-5)
