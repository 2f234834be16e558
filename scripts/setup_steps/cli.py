"""Command line of scripts/setup."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import environment, native, patching, source
from .common import CACHE, LLAMA, PATCHES, SetupError, say

EPILOG = "Running it again takes seconds: only what changed is done. CMake options go through: scripts/setup -DGGML_CUDA=ON (they are remembered)."


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        setup(args)
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/setup",
        description="Makes .venv with the Python packages, fetches and patches the pinned llama.cpp, and builds it into kvcapsule_gguf/lib/.",
        epilog=EPILOG,
    )
    parser.add_argument("--train", action="store_true", help="also install torch and safetensors: for kvcapsule-train --mlp, the converters and the tests")
    parser.add_argument("--tools", action="store_true", help="also build " + ", ".join(native.TOOLS))
    parser.add_argument("--stock", action="store_true", help="for the tests: also build the unpatched library, and install what llama_cpp.server needs")
    parser.add_argument("--backend", choices=native.BACKENDS, action="append", default=[], help="also build this backend of ggml; can be repeated, is remembered")
    parser.add_argument("--source", type=Path, metavar="DIR", help="use this checkout of the pinned llama.cpp commit (it is copied, not changed)")
    parser.add_argument("--jobs", "-j", type=int, default=os.cpu_count() or 2, metavar="N", help="parallel compilers (default: as many as cores)")
    parser.add_argument("--no-build", action="store_true", help="stop before compiling")
    parser.add_argument("-D", dest="defines", action="append", default=[], metavar="NAME=VALUE", help="option for CMake")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    p = parser()
    args = p.parse_args(argv)
    chosen = {name: value for backend in args.backend for name, value in native.BACKENDS[backend].items()}
    args.defines = chosen | dict(_define(p, text) for text in args.defines)
    if args.jobs < 1:
        p.error("--jobs must be at least 1")
    return args


def _define(parser: argparse.ArgumentParser, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        parser.error(f"-D{text}: expected -DNAME=VALUE")
    return name.partition(":")[0], value


def setup(args: argparse.Namespace) -> None:
    CACHE.mkdir(exist_ok=True)
    environment.make()
    archive = source.sdist()
    environment.install(archive, args.train, args.stock)
    environment.require_version()
    pristine = source.pristine(archive, args.source)
    series = patching.Series.read(PATCHES)
    patching.sync(series, pristine, LLAMA / "patched" / "source")
    if args.no_build:
        return
    native.build("patched", defines=args.defines, tools=args.tools, jobs=args.jobs, digest=series.digest())
    if args.stock:
        native.build("stock", defines=native.saved_defines(), tools=False, jobs=args.jobs, digest="")
    say("ready")
