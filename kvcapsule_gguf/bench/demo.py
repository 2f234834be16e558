"""The bundled demo model with pictures that it has really read, all settings open at once."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..chat.files import BUILT_IN
from .settings import SETTINGS as CACHES
from .timing import QUESTION, Ratio, decode, in_turns, speedup

SETTINGS = {  # flags of kvcapsule-chat
    "f16 FA": ["--capsule", "off", "-fa", "on"],
    "f16 no FA": ["--capsule", "off", "-fa", "off"],
    "q8_0 FA": ["--capsule", "off", "-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"],
    "q8_0+q4_0 FA": ["--capsule", "off", "-fa", "on", "-ctk", "q8_0", "-ctv", "q4_0"],
    "q4_0 FA": ["--capsule", "off", "-fa", "on", "-ctk", "q4_0", "-ctv", "q4_0"],
    "capsule FA": ["--capsule", "auto", "-fa", "on"],
    "capsule no FA": ["--capsule", "auto", "-fa", "off"],
    "built-in FA": ["--capsule", BUILT_IN, "-fa", "on"],
    "built-in no FA": ["--capsule", BUILT_IN, "-fa", "off"],
}


@dataclass(frozen=True)
class DemoRow:
    """Milliseconds of a token and of a question of QUESTION tokens, and how many times faster than the fastest of llama.cpp's own caches."""

    pictures: int
    setting: str
    token_ms: float
    question_ms: float
    token_speedup: Ratio
    question_speedup: Ratio


def read_pictures(stack: ExitStack, model: Path, flags: list[str], n: int, folder: Path) -> tuple[Any, list[Any]]:
    """A conversation that has seen n pictures, with a question about each -> its engine and the turns."""
    from ..chat import args
    from ..chat.engine import Engine
    from ..chat.session import Session
    from ..runtime.pictures import load
    from ..scenes import HELD_OUT, draw_scene, make_scene

    options = args.parse([str(model), "-c", str(640 * n + 512), "--hot", "1024", "-b", "576", "-ub", "576", "--temp", "0", "-n", "1", "-t", "1", *flags])
    engine = stack.enter_context(Engine(options, lambda text: None))
    session = Session(engine, options)
    picture = folder / "picture.png"
    turns = []
    for i in range(n):
        draw_scene(make_scene(HELD_OUT[i])).save(picture)
        turns.append(session.ask("How many objects are there?", [load(str(picture))], lambda text: None))
    return engine, turns


def measure_demo(model: Path, n: int, names: tuple[str, ...], rounds: int, quality: float | None = None) -> list[DemoRow]:
    """quality: of the built-in capsule, None = its default. Raises KVCapsuleError, BenchError."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        timers = {}
        for name in names:
            flags = [*SETTINGS[name], "--quality", str(quality)] if quality is not None and BUILT_IN in SETTINGS[name] else SETTINGS[name]
            engine, _ = read_pictures(stack, model, flags, n, folder)
            for size in (1, QUESTION):
                timers[f"{name} {size}"] = lambda e=engine, size=size: decode(e.llama, e.ctx, size)
        times = in_turns(timers, rounds)
    stock = [name for name in names if name in CACHES] or names[:1]
    base = [min((times[f"{name} {size}"] for name in stock), key=median) for size in (1, QUESTION)]
    rows = []
    for name in names:
        token, question = times[f"{name} 1"], times[f"{name} {QUESTION}"]
        rows.append(DemoRow(n, name, 1e3 * median(token), 1e3 * median(question), speedup(token, base[0]), speedup(question, base[1])))
    return rows
