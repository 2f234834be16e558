"""What is in a scene: items in a 3 x 3 grid of cells, decided by a seed alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (212, 36, 36), "green": (38, 168, 58), "blue": (40, 76, 222), "yellow": (238, 220, 48),
    "purple": (146, 54, 178), "orange": (243, 136, 30), "white": (244, 244, 244), "black": (16, 16, 16),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
WORDS = tuple("""
    ANT ARM ART BAG BALL BAT BED BEE BELL BIRD BOAT BONE BOOK BOX BOY BREAD BUG CAB CAKE CAP CAR CAT COAT COIN COLD
    CORN COW CUP DAY DEER DOG DOLL DOOR DOT DRUM DUCK EAR EGG EYE FAN FARM FIRE FISH FLAG FLY FOOD FORK FOX FROG GAME
    GATE GIFT GOAT GOLD HAND HAT HEN HILL HOME HOOK ICE INK JAM JAR JET JOY KEY KING KITE LAKE LAMP LEAF LEG LION LOG
    MAP MEAT MILK MOON MUD NAIL NET NUT OAK OIL OWL PAN PARK PEN PIG PIN POT RAIN RAT RING ROAD ROOF ROPE SALT SEA
    SHIP SHOE SKY SNOW SOAP SOCK SUN TAIL TENT TIE TOE TOY TREE VAN WALL WEB WIND WOLF WOOD YARD YES ZIP ZOO
""".replace("BREAD ", "").split())

# Seeds: never share one between the three.
TRAIN = range(0, 10_000_000)
CALIBRATION = range(10_000_000, 20_000_000)
HELD_OUT = range(20_000_000, 30_000_000)

SIDE = 336  # pictures are laid out at this size; drawing may scale


@dataclass(frozen=True)
class Item:
    """One thing in one cell. `kind` is a shape, "digit" or "word"; `text` is what a digit or word shows."""

    kind: str
    colour: str
    text: str
    row: int
    column: int
    x: float  # centre, in pixels of a 336 x 336 picture
    y: float
    radius: float  # half the height of a shape or digit, half the width of a word

    @property
    def place(self) -> str:
        """Name of the cell, such as "top left"."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"

    @property
    def name(self) -> str:
        """What a viewer calls it, such as "red circle", "blue digit 7" or "white word" (reading it is its own task)."""
        return f"{self.colour} {self.kind} {self.text}" if self.kind == "digit" else f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """Items in raster order, and the seed that also decides background and grain."""

    seed: int
    items: tuple[Item, ...]

    def at(self, row: int, column: int) -> Item | None:
        """The item in a cell, if any."""
        return next((i for i in self.items if (i.row, i.column) == (row, column)), None)


def make_scene(seed: int, dense: bool = False, random_words: float = 0.0) -> Scene:
    """Scene of a seed: 2 to 6 items, at most one word (dense: 7 to 9 items, half of them words; for training the eye).

    `random_words` is the share of words made of random letters instead of the list.
    """
    rng = np.random.default_rng([seed, 1])
    count = int(rng.integers(7, 10) if dense else rng.integers(2, 7))
    words_left = 9 if dense else 1
    word_share = 0.5 if dense else 0.22
    items = []
    for cell in sorted(rng.permutation(9)[:count].tolist()):
        row, column = divmod(cell, 3)
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        draw = rng.random()
        x, y = (column + 0.5) * SIDE / 3, (row + 0.5) * SIDE / 3
        if draw < word_share and words_left:
            words_left -= 1
            text = WORDS[rng.integers(len(WORDS))]
            if rng.random() < random_words:
                text = "".join(chr(65 + c) for c in rng.integers(0, 26, int(rng.integers(3, 5))))
            kind, radius, jitter = "word", rng.uniform(46, 52), 3
        elif draw < word_share + 0.23:
            kind, text, radius, jitter = "digit", str(rng.integers(10)), rng.uniform(28, 44), 8
        else:
            kind, text, radius, jitter = SHAPES[rng.integers(len(SHAPES))], "", rng.uniform(26, 44), 8
        x, y = x + rng.uniform(-jitter, jitter), y + rng.uniform(-8, 8)
        items.append(Item(kind, colour, text, row, column, x, y, float(radius)))
    return Scene(seed, tuple(items))
