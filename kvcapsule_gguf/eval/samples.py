"""Pictures with questions and answers, as every suite gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from ..scenes import Scene

Draw = Callable[["Scene"], Image.Image]


@dataclass(frozen=True)
class Asked:
    """answer None: whatever the model writes with its f16 cache."""

    task: str
    prompt: str
    answer: str | None


@dataclass(frozen=True)
class Sample:
    """Pictures shown one after the other, and what is asked about them."""

    name: str
    pictures: list[Image.Image]
    questions: list[Asked]
