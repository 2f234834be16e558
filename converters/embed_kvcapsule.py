#!/usr/bin/env python3
"""Puts a capsule into an mmproj GGUF, so that one file is enough, or takes it out again (--extract)."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import common

from kvcapsule_gguf.format.embed import embed, extract
from kvcapsule_gguf.format.reader import has_capsule
from kvcapsule_gguf.format.tile_capsule import read_tile_capsule, write_tile_capsule
from kvcapsule_gguf.runtime.program import Parser

logger = logging.getLogger("embed-kvcapsule")


def parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__)
    p.add_argument("mmproj", type=Path, help="vision projector; it is not changed")
    p.add_argument("capsule", type=Path, nargs="?", help="capsule GGUF to put in")
    p.add_argument("--extract", action="store_true", help="write the capsule inside the mmproj as a file of its own")
    p.add_argument("--outfile", type=Path, help="default: <mmproj>-kvcapsule.gguf, with --extract kvcapsule-<mmproj>.gguf")
    common.options(p)
    return p


def parse() -> argparse.Namespace:
    p = parser()
    args = p.parse_args()
    if args.extract == (args.capsule is not None):
        p.error("either a capsule to put in, or --extract")
    return args


def work(args: argparse.Namespace) -> Path:
    """Raises CapsuleError."""
    capsule = extract(args.mmproj) if args.extract else read_tile_capsule(args.capsule)
    common.describe(logger, capsule)
    if args.extract:
        path = args.outfile or args.mmproj.with_name(f"kvcapsule-{args.mmproj.stem.removeprefix('mmproj-')}.gguf")
        return path if args.dry_run else write_tile_capsule(path, capsule)
    if has_capsule(args.mmproj):
        logger.warning("%s has a capsule already, the new one takes its place", args.mmproj)
    path = args.outfile or args.mmproj.with_name(f"{args.mmproj.stem}-kvcapsule.gguf")
    return path if args.dry_run else embed(args.mmproj, capsule, path)


if __name__ == "__main__":
    arguments = parse()
    sys.exit(common.main(logger, arguments, work))
