"""scripts/quality: what its page reads of the study, and the KL divergence of a picture."""

from __future__ import annotations

import sys

from conftest import ROOT

from kvcapsule_gguf.eval.run import Evaluation, Measured
from kvcapsule_gguf.eval.settings import Setting

sys.path.insert(0, str(ROOT / "scripts"))

from quality_steps import page


def test_the_studys_numbers():
    study, q4_0 = page._study(page.STUDY.read_text(encoding="utf-8"))
    assert q4_0 == {"composites": 0.00068, "photographs": 0.00074, "pages": 0.00054}
    assert study["quality 1"] == {"composites": [5.48, 1.15, 0.66, 1.59], "photographs": [5.57, 0.91, 0.55, 1.46], "pages": [6.46, 1.17, 0.56, 1.8]}
    assert study["built in, quality 0.75"]["pages"] == [5.21, 0.45, 0.28, 0.66]


def test_divergence_of_a_picture():
    """Each token counts once: questions of 1 and 3 tokens, then a picture with one question."""
    m = Measured(Setting("a"), kld=[4.0, 0.0, 0.5])
    result = Evaluation("model", [m], task=["x"] * 3, picture=[0, 0, 1], tokens=[1, 3, 2])
    assert page.per_picture(result, m).tolist() == [1.0, 0.5]
