#!/usr/bin/env python3
"""A capsule checkpoint (safetensors, layout in docs/reference/converters.md) to a capsule GGUF, and back with --reverse."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import common

from kvcapsule_gguf.format.base_model import read_base_model
from kvcapsule_gguf.format.capsule import CapsuleFileError
from kvcapsule_gguf.format.checkpoint import read_checkpoint, write_checkpoint
from kvcapsule_gguf.format.fingerprint import base_of
from kvcapsule_gguf.format.tile_capsule import read_tile_capsule, write_tile_capsule
from kvcapsule_gguf.runtime.program import Parser

logger = logging.getLogger("kvcapsule-to-gguf")


def parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__)
    p.add_argument("input", type=Path, help="checkpoint (.safetensors); with --reverse a capsule, or an mmproj with one inside")
    p.add_argument("--outfile", type=Path, help="{ftype} in it becomes the outtype; default: beside the input")
    p.add_argument("--outtype", choices=("f16", "f32"), default="f16", help="of gates and key MLPs, and of axes; a capsule has f16, a checkpoint either (default: %(default)s)")
    p.add_argument("--base", type=Path, metavar="MODEL.gguf", help="check that the capsule is for this model")
    p.add_argument("--reverse", action="store_true", help="capsule GGUF to checkpoint")
    common.options(p)
    return p


def parse() -> argparse.Namespace:
    p = parser()
    args = p.parse_args()
    if args.outtype == "f32" and not args.reverse:
        p.error("--outtype f32 is for --reverse: capsules hold gates, key MLPs and axes in f16")
    return args


def convert(args: argparse.Namespace) -> Path:
    """Raises CapsuleError, ImportError."""
    capsule = read_tile_capsule(args.input) if args.reverse else read_checkpoint(args.input)
    common.describe(logger, capsule)
    if args.base:
        base = base_of(read_base_model(args.base))
        if base != capsule.base:
            raise CapsuleFileError(args.input, f"is for another model than {args.base}")
    path = common.outfile(args.outfile, args.input.with_suffix(".safetensors" if args.reverse else ".gguf"), args.outtype)
    if not args.dry_run:
        if args.reverse:
            write_checkpoint(path, capsule, args.outtype)
        else:
            write_tile_capsule(path, capsule)
    return path


if __name__ == "__main__":
    arguments = parse()
    sys.exit(common.main(logger, arguments, convert))
