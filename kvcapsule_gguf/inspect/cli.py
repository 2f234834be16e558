"""kvcapsule-inspect FILE [--json] [--plot OUT.png]"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..format.reader import has_capsule
from ..format.tile_capsule import read_tile_capsule
from ..plot import Panel, Series, draw, png
from ..runtime import program
from . import report
from .builtin import builtin_of


def parser() -> argparse.ArgumentParser:
    p = program.Parser(prog="kvcapsule-inspect", description="What a capsule stores, what it costs, how it was made.")
    p.add_argument("file", type=Path, metavar="FILE", help="a capsule, an mmproj with one inside, or a model, for its built-in capsule")
    p.add_argument("--json", action="store_true", help="machine-readable, instead of the text")
    p.add_argument("--plot", type=png, metavar="OUT.png", help="bits by layer")
    return p


def panels(data: dict[str, Any]) -> list[Panel]:
    series = [
        Series(f"{tier['times_smaller']:g}x {kind[0].upper()}", [(x["layer"], x[f"{kind}_bits"]) for x in tier["layers"]])
        for tier in data["tiers"] for kind in ("key", "value")
    ]  # fmt: skip
    return [Panel("keys (K) and values (V)", "layer", "bits per value", series)]


def main(argv: Sequence[str] | None = None) -> int:
    return program.run("kvcapsule-inspect", lambda: run(parser().parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    builtin = builtin_of(args.file) if not has_capsule(args.file) else None
    data = report.as_json(args.file, builtin or read_tile_capsule(args.file)) | ({"builtin": True} if builtin else {})
    if args.plot:
        draw(args.plot, panels(data))
    print(json.dumps(data, indent=1) if args.json else report.text(data))


if __name__ == "__main__":
    sys.exit(main())
