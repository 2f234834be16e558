"""kvcapsule-inspect FILE [--json] [--plot OUT.png]"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..format import tile_capsule
from ..format.reader import capsule_version, read_capsule
from ..plot import Panel, Series, draw
from ..runtime import program
from . import report as v1, tiles
from .builtin import builtin_of


def parser() -> argparse.ArgumentParser:
    p = program.Parser(prog="kvcapsule-inspect", description="What a capsule stores, what it costs, how it was made.")
    p.add_argument("file", type=Path, metavar="FILE", help="a capsule, an mmproj with one inside, or a model, for its built-in capsule")
    p.add_argument("--json", action="store_true", help="machine-readable, instead of the text")
    p.add_argument("--plot", type=Path, metavar="OUT.png", help="bits and errors by layer")
    return p


def panels(data: dict[str, Any]) -> list[Panel]:
    tiers = data.get("presets") or [{"name": f"{t['times_smaller']:g}x", "layers": t["layers"]} for t in data["tiers"]]
    out = [
        Panel("keys (K) and values (V)", "layer", "bits per value", [
            Series(f"{tier['name']} {kind[0].upper()}", [(x["layer"], x[f"{kind}_bits"]) for x in tier["layers"]])
            for tier in tiers for kind in ("key", "value")
        ]),
    ]  # fmt: skip
    errors = [
        Series(f"{tier['name']} {kind[0].upper()}", [(x["layer"], x[f"{kind}_error"]) for x in tier["layers"] if f"{kind}_error" in x])
        for tier in tiers for kind in ("key", "value")
    ]  # fmt: skip
    if any(s.points for s in errors):
        out.append(Panel("held-back pictures", "layer", "relative squared error", errors, log_y=True))
    return out


def main(argv: Sequence[str] | None = None) -> int:
    return program.run("kvcapsule-inspect", lambda: run(parser().parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    report: ModuleType
    version = capsule_version(args.file)
    if version is None and (builtin := builtin_of(args.file)) is not None:
        report = tiles
        data = {**tiles.as_json(args.file, builtin), "builtin": True}
    elif version == tile_capsule.VERSION:
        report = tiles
        data = tiles.as_json(args.file, tile_capsule.read_tile_capsule(args.file))
    else:
        report, data = v1, v1.as_json(args.file, read_capsule(args.file))
    if args.plot:
        draw(args.plot, panels(data))
    print(json.dumps(data, indent=1) if args.json else report.text(data))


if __name__ == "__main__":
    sys.exit(main())
