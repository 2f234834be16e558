"""Suites of real pictures, which `scripts/real_decoder suites` puts together from packages: photographs, pages, stamps on backgrounds.

A folder of a suite holds calibration/, test/ and sealed/, each with pictures and questions.json. A hash of a picture's origin says where it lies.
kvcapsule-eval reads `test`. The sealed part is for the script that writes the final table, and for nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..runtime.errors import InputError
from .samples import Asked, Draw, Sample

PICTURES = Path(os.environ.get("KVCAPSULE_PICTURES") or Path(__file__).resolve().parents[2] / ".cache" / "real-pictures")


def samples(suite: str, n_questions: int, per_picture: int = 8, draw: Draw | None = None, part: str = "test") -> Iterator[Sample]:
    """Until there are n_questions. Raises InputError when the suite is not there."""
    if draw:
        raise InputError(f"--mixed-sizes is for drawn scenes; the pictures of {suite} have the sizes they have")
    folder = PICTURES / suite / part
    try:
        listed = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"the suite {suite} is not in {PICTURES}: scripts/real_decoder suites puts it there, or name its folder in KVCAPSULE_PICTURES") from None
    left = n_questions
    for entry in listed:
        if left <= 0:
            return
        asked = [Asked(*q) for q in entry["questions"]][:min(left, per_picture)]
        left -= len(asked)
        yield Sample(entry["name"], [Image.open(folder / file).convert("RGB") for file in entry["pictures"]], asked)
