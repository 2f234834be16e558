"""Questions about pictures, with their answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .pictures import Picture, Placed

NUMBERS = ("None", "One", "Two", "Three", "Four")


@dataclass(frozen=True)
class Question:
    """task: what kind of question it is, as the tables name it."""

    task: str
    text: str
    answer: str


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def listing(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _where(p: Placed, among: list[Placed]) -> str | None:
    """Where a thing is among the others, or None where that cannot be said in few words."""
    if len(among) == 2:
        a, b = among
        if abs(a.x - b.x) > 0.3:
            return "on the left" if p.x == min(a.x, b.x) else "on the right"
        return "at the top" if p.y == min(a.y, b.y) else "at the bottom"
    if len(among) > 2:
        return f"at the {'top' if p.y < 0.5 else 'bottom'} {'left' if p.x < 0.5 else 'right'}"
    return None


def about(picture: Picture, rng: np.random.Generator, nouns: list[str]) -> list[Question]:
    """All kinds of questions that the picture allows, in random order. nouns: what else a question could name."""
    out: list[Question] = []
    def ask(task: str, text: str, answer: str) -> None:
        out.append(Question(task, text, sentence(answer)))
    what = str(rng.choice(["What is in the picture?", "What do you see?", "Describe the picture."]))
    if picture.kind == "page":
        ask("what", what, "a page of text")
        ask("yes or no", f"Is there {_article(_other(rng, nouns, []))} in the picture?", "no")
    elif picture.kind == "words":
        ask("what", what, "a word" if len(picture.lines) == 1 else "two words")
        ask("read", "What does the text say?", " ".join(picture.lines))
        if len(picture.lines) == 2:
            which = int(rng.integers(2))
            ask("read", f"What is the {('first', 'second')[which]} word?", picture.lines[which])
    else:
        _about_things(picture.placed, rng, nouns, what, ask)
    return [out[i] for i in rng.permutation(len(out))]


def _about_things(placed: list[Placed], rng: np.random.Generator, nouns: list[str], what: str, ask) -> None:
    in_order = sorted(placed, key=lambda p: (p.y > 0.5, p.x) if len(placed) > 2 else (p.x, p.y))
    ask("what", what, listing([p.thing.name for p in in_order]))
    ask("how many", "How many things are in the picture?", NUMBERS[len(placed)].lower())
    for p in [placed[i] for i in rng.permutation(len(placed))[:2]]:
        place = _where(p, placed)
        if place:
            ask("at", f"What is {place}?", p.thing.name)
            ask("where", f"Where is the {p.thing.noun}?", place)
    p = placed[rng.integers(len(placed))]
    here = [q.thing.noun for q in placed]
    pair = [p.thing.noun, _other(rng, nouns, here)]
    a, b = (pair[i] for i in rng.permutation(2))
    ask("which of two", f"Is there {_article(a)} or {_article(b)} in the picture?", _article(p.thing.noun))
    noun = p.thing.noun if rng.random() < 0.5 else _other(rng, nouns, here)
    ask("yes or no", f"Is there {_article(noun)} in the picture?", "yes" if noun in here else "no")
    for p in placed:
        if p.thing.colour:
            ask("colour", f"What colour is the {p.thing.noun}?", p.thing.colour)


def between(pictures: list[Picture], rng: np.random.Generator, nouns: list[str]) -> list[Question]:
    """Questions about several pictures, shown one after the other."""
    out: list[Question] = []
    for i in rng.permutation(len(pictures))[:3]:
        picture = pictures[i]
        inner = [q for q in about(picture, rng, nouns) if q.task in ("what", "at", "read", "colour", "where")]
        for q in inner[:2]:
            text = q.text.replace(" in the picture?", "?").replace("the picture.", "it.")
            text = "what do you see?" if q.task == "what" else text[0].lower() + text[1:]
            out.append(Question(f"{q.task}, several", f"In picture {i + 1}, {text}", q.answer))
    once = [(i, p.thing) for i, picture in enumerate(pictures) for p in picture.placed
            if sum(p.thing.noun in [q.thing.noun for q in other.placed] for other in pictures) == 1]
    for i in rng.permutation(len(once))[:2]:
        out.append(Question("which picture", f"Which picture shows the {once[i][1].noun}?", sentence(f"picture {once[i][0] + 1}")))
    return out


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _other(rng: np.random.Generator, nouns: list[str], but: list[str]) -> str:
    while (noun := nouns[rng.integers(len(nouns))]) in but:
        pass
    return noun
