"""Many questions on one image in one sequence: each sees the image and itself only, so the image is paid for once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..scenes import TASKS, Question, Scene, make_questions
from .tokenizer import Prompts

IGNORE = -100
SEPARATORS = ("", "", "", " ", "\n")  # what may stand between the image marker and the question


@dataclass(frozen=True)
class Packed:
    """Text of one packed sequence; every array is [budget]."""

    ids: np.ndarray
    targets: np.ndarray  # next token where it belongs to an answer, else IGNORE
    positions: np.ndarray  # relative to the first position after the image
    segment: np.ndarray  # index of the conversation a token belongs to, -1 for padding


def conversation(prompts: Prompts, questions: list[Question], separator: str) -> tuple[list[int], list[int]]:
    """Tokens and targets of the turns that follow an image."""
    ids: list[int] = []
    targets: list[int] = []
    for turn, question in enumerate(questions):
        asked = prompts.later_question(question.prompt) if turn else prompts.question(question.prompt, separator)
        answer = prompts.answer(question.answer)
        ids += asked + answer
        targets += [IGNORE] * (len(asked) - 1) + answer + [IGNORE]
    return ids, targets


def pack(prompts: Prompts, questions: list[Question], budget: int, rng: np.random.Generator, multi_turn: bool = True) -> Packed:
    """Fill `budget` tokens with conversations of one turn (mostly) to three turns; segment i is questions[i] if not multi_turn."""
    ids = np.zeros(budget, np.int64)
    targets = np.full(budget, IGNORE, np.int64)
    positions = np.zeros(budget, np.int64)
    segment = np.full(budget, -1, np.int64)
    at = index = 0
    left = list(questions)
    while left:
        turns = int(rng.integers(2, 4)) if multi_turn and rng.random() < 0.15 else 1
        tokens, wanted = conversation(prompts, left[:turns], SEPARATORS[rng.integers(len(SEPARATORS))] if multi_turn else "")
        left = left[turns:]
        if at + len(tokens) > budget:
            index += not multi_turn
            continue
        gap = int(rng.integers(0, 400)) if multi_turn and rng.random() < 0.3 else 0
        where = slice(at, at + len(tokens))
        ids[where], targets[where], segment[where] = tokens, wanted, index
        positions[where] = gap + np.arange(len(tokens))
        at, index = at + len(tokens), index + 1
    return Packed(ids, targets, positions, segment)


def questions_for(scene: Scene, count: int, rng: np.random.Generator) -> list[Question]:
    """Questions of all tasks, those that are learned last more often, in random order."""
    tasks = (*TASKS[:7], "locate", "count", "locate", "count")
    questions = make_questions(scene, count, int(rng.integers(1 << 30)), tasks)
    return [questions[i] for i in rng.permutation(len(questions))]


def attention_mask(prefix: int, image: int, segments: np.ndarray, image_bias: float) -> np.ndarray:
    """float32 [B, 1, T, T], T = prefix + image + budget: causal in the image part, then each conversation by itself.

    `image_bias` is added to image columns: log(576 / image) where only some of the image's tokens are shown.
    """
    batch, budget = segments.shape
    before = prefix + image
    total = before + budget
    mask = np.full((batch, total, total), -np.inf, np.float32)
    mask[:, :before, :before] = np.triu(np.full((before, before), -np.inf, np.float32), 1)
    mask[:, before:, :before] = 0
    mask[:, :, prefix:before] += image_bias
    same = (segments[:, :, None] == segments[:, None, :]) & np.tri(budget, dtype=bool)
    mask[:, before:, before:] = np.where(same, 0, -np.inf)
    return mask[:, None]
