"""Questions about scenes and their answers, in short plain English."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layout import COLOURS, PLACES, SHAPES, Item, Scene

TASKS = ("identify", "locate", "colour", "count", "digit", "read", "list", "compare")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Question:
    """A question of a task (one of TASKS), its prompt and the expected answer."""

    task: str
    prompt: str
    answer: str


def is_correct(question: Question, answer: str) -> bool:
    """Exact match, blind to surrounding space, case and a final full stop."""
    return answer.strip().rstrip(".").casefold() == question.answer.casefold()


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _unique(scene: Scene, key) -> list[Item]:
    keys = [key(item) for item in scene.items]
    return [item for item, k in zip(scene.items, keys) if keys.count(k) == 1]


def _identify(scene: Scene, rng: np.random.Generator) -> Question:
    empty = rng.random() < 0.2
    place = _pick(rng, PLACES) if empty else _pick(rng, scene.items).place
    item = scene.at(*divmod(PLACES.index(place), 3))
    prompt = _pick(rng, (f"What is at the {place}?", f"What do you see at the {place}?"))
    return Question("identify", prompt, item.name if item else "nothing")


def _locate(scene: Scene, rng: np.random.Generator) -> Question | None:
    by_kind, by_colour, by_both = (_unique(scene, key) for key in (
        lambda i: i.kind, lambda i: i.colour, lambda i: (i.kind, i.colour)))
    options = [(i, i.kind) for i in by_kind] + [(i, f"{i.colour} object") for i in by_colour]
    options += [(i, f"{i.colour} {i.kind}") for i in by_both]
    if not options:
        return None
    item, what = _pick(rng, options)
    return Question("locate", f"Where is the {what}?", item.place)


def _colour(scene: Scene, rng: np.random.Generator) -> Question:
    by_kind = _unique(scene, lambda i: i.kind)
    if by_kind and rng.random() < 0.6:
        item = _pick(rng, by_kind)
        return Question("colour", f"What colour is the {item.kind}?", item.colour)
    item = _pick(rng, scene.items)
    return Question("colour", f"What colour is the object at the {item.place}?", item.colour)


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    draw = rng.random()
    if draw < 0.2:
        return Question("count", "How many objects are there?", NUMBERS[len(scene.items)])
    if draw < 0.6:
        colour = _pick(rng, scene.items).colour if rng.random() < 0.75 else _pick(rng, list(COLOURS))
        amount = sum(item.colour == colour for item in scene.items)
        return Question("count", f"How many {colour} objects are there?", NUMBERS[amount])
    kind = _pick(rng, scene.items).kind if rng.random() < 0.75 else _pick(rng, (*SHAPES, "digit", "word"))
    amount = sum(item.kind == kind for item in scene.items)
    plural = "crosses" if kind == "cross" else f"{kind}s"
    return Question("count", f"How many {plural} are there?", NUMBERS[amount])


def _read(scene: Scene, rng: np.random.Generator, kind: str) -> Question | None:
    items = [item for item in scene.items if item.kind == kind]
    if not items:
        return None
    item = _pick(rng, items)
    if len(items) == 1 and rng.random() < 0.7:
        prompt = f"What is the {kind}?" if kind == "digit" else "What does the word say?"
    else:
        prompt = f"Read the {kind} at the {item.place}."
    return Question("digit" if kind == "digit" else "read", prompt, item.text)


def _list(scene: Scene) -> Question:
    return Question("list", "List the scene.", ", ".join(f"{item.place} {item.name}" for item in scene.items))


def ask(scene: Scene, task: str, rng: np.random.Generator) -> Question | None:
    """One question of a task, or None where the scene does not allow it."""
    if task in ("digit", "read"):
        return _read(scene, rng, "digit" if task == "digit" else "word")
    if task == "list":
        return _list(scene)
    return {"identify": _identify, "locate": _locate, "colour": _colour, "count": _count}[task](scene, rng)


def make_questions(scene: Scene, count: int = 8, seed: int = 0, tasks: tuple[str, ...] = TASKS[:7]) -> list[Question]:
    """Up to `count` different questions about a scene, tasks in turn, decided by scene and `seed`."""
    rng = np.random.default_rng([scene.seed, 3, seed])
    found: dict[str, Question] = {}
    order = [tasks[i] for i in rng.permutation(len(tasks))]
    for turn in range(count * 4):
        question = ask(scene, order[turn % len(order)], rng)
        if question is not None:
            found.setdefault(question.prompt, question)
        if len(found) == count:
            break
    return list(found.values())


def compare_questions(first: Scene, second: Scene, seed: int = 0) -> list[Question]:
    """Questions about two pictures shown one after the other in the same message."""
    rng = np.random.default_rng([first.seed, second.seed, seed])
    sizes = len(first.items), len(second.items)
    more = "the same" if sizes[0] == sizes[1] else "first" if sizes[0] > sizes[1] else "second"
    out = [Question("compare", "Which image has more objects?", more)]
    for ordinal, scene in (("first", first), ("second", second)):
        question = _identify(scene, rng)
        out.append(Question("compare", question.prompt[:-1] + f" of the {ordinal} image?", question.answer))
        out.append(Question("compare", f"How many objects are in the {ordinal} image?", NUMBERS[len(scene.items)]))
    return out
