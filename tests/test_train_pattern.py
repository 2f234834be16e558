"""Which tokens `retain` keeps, and which kept ones each dropped token is predicted from."""

from __future__ import annotations

import numpy as np
import pytest

from kvcapsule_gguf.train.pattern import kept_tokens, most_used_first, neighbours


@pytest.mark.parametrize("n", [48, 64, 72, 96])
@pytest.mark.parametrize("width", [0, 24])
def test_pattern(n, width):
    for m in (n // 5, round(0.4 * n), n // 2):
        kept = kept_tokens(n, m, width)
        assert len(set(kept)) == m and (np.diff(kept) > 0).all()
        # spread evenly: no gap is more than three mean ones
        assert np.diff(np.concatenate([[-1], kept, [n]])).max() <= 3 * n / m
        dropped, near = neighbours(n, kept, 4, width)
        assert sorted([*dropped, *kept]) == list(range(n)) and near.min() >= 0 and near.max() < m
        for t, row in zip(dropped, near):
            assert len(set(row)) == 4
            left, right = [k for k in kept if k < t], [k for k in kept if k > t]
            assert (not left or left[-1] in kept[row[:2]]) and (not right or right[0] in kept[row[:2]])
        ordered, same = most_used_first(kept, near)
        assert (ordered[same] == kept[near]).all() and sorted(ordered) == kept.tolist()
        assert (np.diff(np.bincount(same.ravel(), minlength=m)) <= 0).all()


def test_neighbours_above_and_below():
    """Rows of 4 tokens, kept 0 2 5 8 10: token 6 has 5 on its left, 8 on its right, 2 above and 10 below."""
    kept = np.array([0, 2, 5, 8, 10])
    dropped, near = neighbours(12, kept, 4, 4)
    assert kept[near[dropped.tolist().index(6)]].tolist() == [5, 8, 2, 10]
    few = neighbours(4, np.array([1]), 3)[1]
    assert few.tolist() == [[0, 0, 0]] * 3
