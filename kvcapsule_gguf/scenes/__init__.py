"""Drawn scenes: small pictures with questions whose answers are known.

>>> from kvcapsule_gguf.scenes import HELD_OUT, draw_scene, make_questions, make_scene
>>> scene = make_scene(HELD_OUT[0])
>>> image = draw_scene(scene)                  # PIL image, 336 x 336
>>> questions = make_questions(scene, 8)      # Question(task, prompt, answer)
"""

from .drawing import draw_scene
from .layout import CALIBRATION, COLOURS, HELD_OUT, PLACES, SHAPES, TRAIN, WORDS, Item, Scene, make_scene
from .questions import TASKS, Question, compare_questions, is_correct, make_questions
from .sizes import random_size, size_of

__all__ = [
    "CALIBRATION", "COLOURS", "HELD_OUT", "PLACES", "SHAPES", "TASKS", "TRAIN", "WORDS",
    "Item", "Question", "Scene", "compare_questions", "draw_scene", "is_correct", "make_questions", "make_scene", "random_size", "size_of",
]
