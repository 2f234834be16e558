"""kvcapsule-bench op|model|compress|demo"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..chat.args import number
from ..chat.files import demo_folder, model_in
from ..plot import png
from ..runtime import program
from . import compress, demo, op, report, whole
from .geometry import GEOMETRIES
from .run import Run
from .settings import SETTINGS
from .timing import QUESTION, BenchError

COMPRESSED = [name for name, s in SETTINGS.items() if s.capsule and not s.hot]


def listed(known: Sequence[str] | None) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if known is not None and name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}, there are: {', '.join(known or ())}")
        return names

    return parse


def numbers(least: int) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        try:
            found = tuple(int(x) for x in text.split(","))
        except ValueError:
            found = ()
        if not found or min(found) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from {least} on")
        return found

    return parse


def parser() -> argparse.ArgumentParser:
    p = program.Parser(
        prog="kvcapsule-bench",
        description="Times decoding with compressed images against llama.cpp's own caches, in turns in one process. Weights and caches are random: speed does not depend on them.",
    )
    sub = p.add_subparsers(dest="what", required=True, metavar="WHAT")

    def add(name: str, text: str, settings: Sequence[str], default: Sequence[str]) -> argparse.ArgumentParser:
        q = sub.add_parser(name, help=text, description=text)
        q.add_argument("-s", "--settings", type=listed(settings), default=",".join(default), metavar="A,B,...", help="caches (default: %(default)s)")
        q.add_argument("-r", "--rounds", type=int, default=9, metavar="N", help="each of them once a round (default: %(default)s)")
        q.add_argument("--json", action="store_true", help="results as JSON instead of a table")
        if name != "demo":
            q.add_argument("geometry", nargs="*", metavar="GEOMETRY", help=f"sizes of a model: {', '.join(GEOMETRIES)} (default: all)")
            q.add_argument("-t", "--threads", type=int, default=1, metavar="N", help="CPU threads (default: %(default)s)")
            q.add_argument("-ngl", "--gpu-layers", type=int, default=0, metavar="N", help="layers on a GPU (default: none)")
            q.add_argument("--ik", type=Path, metavar="PYTHON", help="the Python that has ik-llama-cpp-python, for caches with ik in their name")
            q.add_argument("--folder", type=Path, default=Path(".cache") / "bench", metavar="DIR", help="for the models that it makes (default: %(default)s)")
        if name in ("op", "model"):
            q.add_argument("--plot", type=png, metavar="F.png", help="draw a picture as well")
        return q

    q = add("op", "attention alone, in one layer", tuple(SETTINGS), op.DEFAULT)
    q.add_argument("--tokens", type=numbers(1), default="2048,4096,8192,16384", metavar="N,...", help="vision tokens (default: %(default)s)")
    q = add("model", "a whole model: tokens/s, first token of a question, memory", tuple(SETTINGS), whole.DEFAULT)
    q.add_argument("--capsule", choices=COMPRESSED, default="capsule", help="what they are compared with (default: %(default)s)")
    q.add_argument("--images", type=numbers(0), default="1,4,16", metavar="N,...", help="how many pictures (default: %(default)s)")
    q.add_argument("--question", type=int, default=QUESTION, metavar="N", help="tokens of a question, 0: do not time one (default: %(default)s)")
    add("compress", "compressing an image beside decoding it; the geometry 'demo' is the bundled demo model", COMPRESSED, compress.DEFAULT)
    q = add("demo", "the bundled demo model with real pictures", tuple(demo.SETTINGS), tuple(demo.SETTINGS))
    q.add_argument("--images", type=numbers(1), default="1,4,16", metavar="N,...", help="how many pictures (default: %(default)s)")
    q.add_argument("--quality", type=number(float, 0, 100, above=True), metavar="Q", help="of the built-in capsule, as in kvcapsule-chat (default: its own)")
    q.add_argument("--model", type=Path, default=demo_folder(), metavar="MODEL", help="the model, or the folder that holds it and its capsule (default: the bundled one)")
    return p


def run(args: argparse.Namespace) -> list[Any]:
    """Prints what it is at on stderr. Raises KVCapsuleError."""
    rows: list[Any] = []

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if args.what == "demo":
        model = args.model if args.model.is_file() else model_in(args.model)
        for n in args.images:
            say(f"{n} pictures")
            rows += demo.measure_demo(model, n, args.settings, args.rounds, args.quality)
        return rows
    how = Run(args.folder, args.rounds, args.threads, args.gpu_layers, args.ik)
    known = [*GEOMETRIES, *(["demo"] if args.what == "compress" else [])]
    unknown = [name for name in args.geometry if name not in known]
    if unknown:
        raise BenchError(f"no geometry {unknown[0]!r}, there are: {', '.join(known)}")
    for name in args.geometry or known:
        if args.what == "compress":
            say(name)
            if name == "demo":
                rows += compress.measure_compress_demo(model_in(demo_folder()), how)
            else:
                rows += compress.measure_compress(GEOMETRIES[name], [SETTINGS[s] for s in args.settings], how)
            continue
        for n in args.tokens if args.what == "op" else args.images:
            say(f"{name}, {n} {'tokens' if args.what == 'op' else 'images'}")
            if args.what == "op":
                rows += op.measure_op(GEOMETRIES[name], n, args.settings, how)
            else:
                rows += whole.measure_whole(GEOMETRIES[name], n, args.capsule, args.settings, how, args.question)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    return program.run("kvcapsule-bench", lambda: _main(parser().parse_args(argv)))


def _main(args: argparse.Namespace) -> None:
    rows = run(args)
    if getattr(args, "plot", None):
        (report.op_plot if args.what == "op" else report.whole_plot)(rows, args.plot)
    tables: dict[str, Callable[[list[Any]], str]] = {"op": report.op_table, "model": report.whole_table, "compress": report.compress_table, "demo": report.demo_table}
    print(json.dumps([asdict(r) for r in rows], indent=1) if args.json else tables[args.what](rows))
