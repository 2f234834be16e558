"""What the pictures are put together from: named stamps, coloured shapes, backgrounds, words."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# no things: letters, digits, coins and notes; road signs and chessmen have rules for names
UNNAMED = ("symbols", "people/body_parts", "town/roadsigns", "town/flags", "town/houses", "military/vehicles")
ODD = ("ripe", "xanthia", "cep", "dumper")  # descriptions that are no names, or that nobody would use
SAME = {
    "bunny": "rabbit", "headstone": "tombstone", "gravestone": "tombstone", "graveyard": "tombstone", "fortress": "fort", "chick": "chicken",
    "gander": "goose", "drake": "duck", "doe": "deer", "wapiti": "deer", "caribou": "deer", "zebu": "cow", "bull": "cow", "dromedary": "camel",
    "gnu": "bison", "tepee": "tent", "hornet": "bee", "seagull": "gull",
}  # names of things that the stamps do not tell apart
COLOURS = {
    "red": (215, 30, 35), "green": (30, 150, 50), "blue": (35, 70, 215), "yellow": (245, 215, 35),
    "orange": (245, 135, 25), "purple": (130, 40, 165), "black": (15, 15, 15), "white": (250, 250, 250),
}
SHAPES = ("square", "circle", "triangle", "cross")
WORDS = tuple(
    "apple bread chair dance eagle field glass house island jungle kitchen lemon money night ocean paper queen river stone table "
    "uncle voice water yellow zero book city door east fire gold hand iron king lamp moon name open park rain salt time road west "
    "school summer winter garden bridge letter market music number doctor planet silver station story sugar travel train window world".split()
)


@dataclass(frozen=True)
class Thing:
    """name: with its article, as in an answer; noun: as in a question; colour: of a shape, else empty."""

    name: str
    noun: str
    colour: str = ""
    file: Path | None = None


def share(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text: where it falls decides a split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


@lru_cache(1)
def stamps(folder: Path) -> list[Thing]:
    """The stamps whose description is an article and one word."""
    found = []
    for file in sorted(folder.rglob("*.png")):
        place = file.relative_to(folder).as_posix()
        text = file.with_suffix(".txt")
        if place.startswith(UNNAMED) or "_mirror" in place or "_flip" in place or not text.exists():
            continue
        match = re.match(r"(An?) ([a-z]+)[.!,(]", text.read_text(encoding="utf8", errors="replace").strip() + ".")
        if match and match[2] not in ODD:
            noun = SAME.get(match[2], match[2])
            found.append(Thing(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}", noun, file=file))
    return found


def known(all_stamps: list[Thing]) -> tuple[list[Thing], list[Thing]]:
    """Those of names that training sees, and those of names that it never sees (one in twelve)."""
    never = [t for t in all_stamps if share(f"name {t.noun}") < 1 / 12]
    return [t for t in all_stamps if t not in never], never


def shape(noun: str, colour: str) -> Thing:
    return Thing(f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {noun}", noun, colour)


@lru_cache(400)
def cut_out(thing: Thing) -> Image.Image:
    """The thing as RGBA, cropped to what is not transparent."""
    if thing.file is not None:
        image = Image.open(thing.file).convert("RGBA")
        image.thumbnail((300, 300))
        box = image.getchannel("A").getbbox()
        return image.crop(box) if box else image
    image = Image.new("RGBA", (200, 200))
    draw = ImageDraw.Draw(image)
    fill = COLOURS[thing.colour]
    edge = tuple(c // 2 for c in fill)
    if thing.noun == "square":
        draw.rectangle((4, 4, 196, 196), fill, edge, 3)
    elif thing.noun == "circle":
        draw.ellipse((4, 4, 196, 196), fill, edge, 3)
    elif thing.noun == "triangle":
        draw.polygon([(100, 4), (196, 190), (4, 190)], fill, edge, 3)
    else:
        draw.polygon([(68, 4), (132, 4), (132, 68), (196, 68), (196, 132), (132, 132), (132, 196), (68, 196), (68, 132), (4, 132), (4, 68), (68, 68)], fill, edge, 3)
    return image


@lru_cache(2)
def backgrounds(folders: tuple[Path, ...], held: bool) -> list[Path]:
    """Photographs and wallpapers; one in five is kept from training."""
    files = [f for folder in folders for f in sorted(folder.rglob("*")) if f.suffix in (".jpg", ".png", ".webp") and f.stem != "screenshot" and f.stat().st_size > 60_000]
    return [f for f in files if (share(background_name(f)) < 0.2) == held]


def background_name(file: Path) -> str:
    """The same for all sizes and shades of a wallpaper."""
    return file.parents[2].name if "contents" in file.parts else file.stem.removesuffix("-l").removesuffix("-d")


@lru_cache(256)
def background(file: Path, cache: Path) -> Image.Image:
    """At most 640 pixels a side, kept in `cache`: decoding the originals takes a second each."""
    small = cache / (hashlib.sha256(str(file).encode()).hexdigest()[:16] + ".jpg")
    if not small.exists():
        cache.mkdir(parents=True, exist_ok=True)
        image = Image.open(file).convert("RGB")
        image.thumbnail((640, 640))
        image.save(small, quality=92)
    return Image.open(small).convert("RGB")


@lru_cache(64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that Pillow brings along."""
    return ImageFont.load_default(size)
