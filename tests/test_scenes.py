"""Drawn scenes: deterministic, well-formed, and answerable."""

import numpy as np
import pytest

from kvcapsule_gguf.scenes import CALIBRATION, HELD_OUT, PLACES, TASKS, TRAIN, WORDS, Scene, compare_questions, draw_scene, is_correct, make_questions, make_scene, size_of

SEEDS = range(HELD_OUT.start, HELD_OUT.start + 60)


def test_seed_ranges_are_disjoint():
    ranges = sorted((r.start, r.stop) for r in (TRAIN, CALIBRATION, HELD_OUT))
    assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:]))


def test_same_seed_same_picture_and_questions():
    a, b = make_scene(SEEDS[0]), make_scene(SEEDS[0])
    assert a == b and make_questions(a, 12) == make_questions(b, 12)
    assert np.array_equal(np.asarray(draw_scene(a)), np.asarray(draw_scene(b)))
    assert a != make_scene(SEEDS[1])


@pytest.mark.parametrize("side", [168, 336])
def test_picture_size(side):
    assert draw_scene(make_scene(SEEDS[0]), side).size == (side, side)


@pytest.mark.parametrize("size", [(420, 280), (280, 392)])
def test_stretched_pictures(size):
    """Places stretch with the picture: what differs from the bare background lies around the stretched centres of the items."""
    scene = make_scene(SEEDS[0])
    bare = np.asarray(draw_scene(Scene(scene.seed, ()), size), int)
    changed = np.abs(np.asarray(draw_scene(scene, size), int) - bare).max(-1) > 0
    assert changed.shape == size[::-1]
    zoom = min(size) / 336
    y, x = np.nonzero(changed)
    distance = np.min([np.hypot(x - i.x * size[0] / 336, y - i.y * size[1] / 336) - i.radius * zoom for i in scene.items], 0)
    assert distance.max() < 30 * zoom
    for item in scene.items:
        near = np.hypot(x - item.x * size[0] / 336, y - item.y * size[1] / 336) < 0.9 * item.radius * zoom
        assert near.sum() > 100


def test_sizes_go_with_seeds():
    sizes = [size_of(seed) for seed in SEEDS]
    assert sizes == [size_of(seed) for seed in SEEDS] and len(set(sizes)) > 15
    assert all(side % 28 == 0 and 280 <= side <= 420 for size in sizes for side in size)
    assert np.array_equal(np.asarray(draw_scene(make_scene(SEEDS[0]), (336, 336))), np.asarray(draw_scene(make_scene(SEEDS[0]))))


def test_items_stay_in_their_cells():
    for seed in SEEDS:
        scene = make_scene(seed)
        assert 2 <= len(scene.items) <= 6
        assert len({(i.row, i.column) for i in scene.items}) == len(scene.items)
        for item in scene.items:
            assert item.column * 112 <= item.x - item.radius + 4 and item.x + item.radius - 4 <= (item.column + 1) * 112
            assert item.row * 112 <= item.y <= (item.row + 1) * 112
            assert item.kind != "word" or item.text in WORDS


def test_items_are_visible():
    for seed in SEEDS[:10]:
        scene = make_scene(seed)
        picture = np.asarray(draw_scene(scene)).astype(int)
        for item in scene.items:
            x, y, r = int(item.x), int(item.y), int(item.radius)
            box = picture[max(0, y - r) : y + r, max(0, x - r) : x + r]
            assert np.ptp(box, axis=(0, 1)).max() > 40, (seed, item)


def test_questions_agree_with_the_scene():
    tasks = set()
    for seed in SEEDS:
        scene = make_scene(seed)
        questions = make_questions(scene, 14)
        assert len({q.prompt for q in questions}) == len(questions) >= 8
        for q in questions:
            tasks.add(q.task)
            place = next((p for p in PLACES if p in q.prompt), None)
            item = scene.at(*divmod(PLACES.index(place), 3)) if place else None
            if q.task == "identify":
                assert q.answer == (item.name if item else "nothing")
            elif q.task == "locate":
                assert q.answer in {i.place for i in scene.items}
            elif q.task == "list":
                assert q.answer.count(",") == len(scene.items) - 1
            elif q.task in ("read", "digit"):
                assert q.answer in {i.text for i in scene.items}
    assert tasks == set(TASKS) - {"compare"}


def test_compare_and_is_correct():
    questions = compare_questions(make_scene(SEEDS[0]), make_scene(SEEDS[1]))
    assert {q.task for q in questions} == {"compare"}
    question = questions[0]
    assert is_correct(question, f" {question.answer.upper()}.") and not is_correct(question, "perhaps")
