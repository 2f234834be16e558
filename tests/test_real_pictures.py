"""Suites of real pictures: how they are split, and how kvcapsule-eval reads them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "scripts"))

from real_decoder_steps import suites, things

from kvcapsule_gguf.eval import real, suites as of_eval
from kvcapsule_gguf.study.pictures import real_items


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "PICTURES", tmp_path)
    return tmp_path


def entries():
    for i in range(40):
        picture = Image.fromarray(np.full((30, 40, 3), i, np.uint8))
        yield suites.Entry(f"document {i // 2}", f"{i:02d}", [picture] * (1 + i % 2), [("describe", "Describe the picture.", None), ("read", "What does the text say?", f"Näme {i}")])


def test_what_was_written_is_read(folder):
    counts = suites._write(entries(), folder / "pages")
    assert sum(counts.values()) == 40 and min(counts.values()) > 0
    read = list(of_eval.SUITES["pages"](1000))
    assert len(read) == counts["test"]
    for sample in read:
        i = int(sample.name)
        assert len(sample.pictures) == 1 + i % 2 and all(np.array_equal(np.asarray(p), np.full((30, 40, 3), i)) for p in sample.pictures)
        assert [(q.task, q.answer) for q in sample.questions] == [("describe", None), ("read", f"Näme {i}")]
    assert sum(len(s.questions) for s in of_eval.SUITES["pages"](5, 1)) == 5


def test_a_document_lies_in_one_part_and_parts_share_nothing(folder):
    suites._write(entries(), folder / "pages")
    parts = {part: {int(s.name) for s in real.samples("pages", 1000, part=part)} for part in ("calibration", "test", "sealed")}
    assert sorted(i for found in parts.values() for i in found) == list(range(40))
    for found in parts.values():
        assert {i ^ 1 for i in found} == found  # both pages of a document


def test_the_study_sees_the_sealed_part_only_where_it_is_told_to(folder):
    for name in ("photographs", "pages"):
        suites._write(entries(), folder / name)
    parts = {name: {part: {int(s.name) for s in real.samples(name, 1000, part=part)} for part in ("test", "sealed")} for name in ("photographs", "pages")}

    def shown(name: str, sealed: bool) -> set[int]:
        return {int(np.asarray(image.convert("L"))[0, 0]) for image, _ in real_items(folder, name, sealed)}

    assert shown("pages", False) == parts["pages"]["test"] and shown("pages", True) == parts["pages"]["sealed"]
    assert shown("photographs", False) == set(range(40)) - parts["photographs"]["sealed"] and shown("photographs", True) == parts["photographs"]["sealed"]


def test_what_is_missing_is_said(folder):
    with pytest.raises(ValueError, match="scripts/real_decoder suites"):
        list(of_eval.SUITES["photographs"](10))
    with pytest.raises(ValueError, match="--mixed-sizes"):
        list(of_eval.SUITES["photographs"](10, 8, lambda scene: None))


def test_sizes_and_shades_of_a_wallpaper_are_one_background(tmp_path):
    wallpaper = tmp_path / "wallpapers" / "Volna" / "contents"
    assert {things.background_name(f) for f in (wallpaper / "images" / "1080x1920.png", wallpaper / "images_dark" / "5120x2880.png")} == {"Volna"}
    assert {things.background_name(tmp_path / "gnome" / f"wood-{x}.webp") for x in "dl"} == {"wood"}
