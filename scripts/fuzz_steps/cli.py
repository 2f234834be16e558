"""scripts/fuzz: options and report."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from setup_steps.common import LLAMA

from . import corpus
from .build import FuzzError, build, find_compiler
from .run import Outcome, run

TARGETS = ("capsule", "state", "context")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("target", choices=[*TARGETS, "all"], nargs="?", default="all", help="capsule: the loader; state: what a saved state says about images; context: the same put into a real context (all: each of them)")
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs per target (%(default)s)")
    parser.add_argument("--minutes", type=float, default=0, help="stop a target after this time, whatever its runs (0: never)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--driver", action="store_true", help="the standalone driver, even where there is libFuzzer")
    parser.add_argument("--source", type=Path, default=LLAMA / "patched" / "source", help="llama.cpp with the patch series (default: that of scripts/setup)")
    parser.add_argument("--library", type=Path, default=LLAMA / "patched" / "build", help="its CMake build, for the target context (default: that of scripts/setup)")
    parser.add_argument("--minimize", action="store_true", help="afterwards put what was found, minimized, into tests/fuzz/corpus/ (needs libFuzzer)")
    parser.add_argument("--report", type=Path, help="a Markdown file that gets the lines as well")
    args = parser.parse_args(argv)
    try:
        outcomes = _run(args)
    except FuzzError as error:
        print(f"fuzz: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fuzz: interrupted; the corpus so far is kept in .cache/fuzz/", file=sys.stderr)
        return 130
    if args.report:
        args.report.write_text(_report(args.report, outcomes))
    return 0


def _run(args: argparse.Namespace) -> list[Outcome]:
    compiler = find_compiler()
    if args.driver:
        compiler = replace(compiler, libfuzzer=False)
    outcomes = []
    for target in TARGETS if args.target == "all" else (args.target,):
        program = build(target, args.source, compiler, args.library)
        outcomes.append(run(target, program, compiler, runs=args.runs, seconds=round(60 * args.minutes), seed=args.seed))
        print(outcomes[-1].line(), flush=True)
        if args.minimize:
            if not compiler.libfuzzer:
                raise FuzzError("--minimize needs libFuzzer: install clang")
            print(f"{target}: {corpus.minimize(target, program)} inputs in {corpus.archive(target).name}", flush=True)
    return outcomes


def _report(path: Path, outcomes: list[Outcome]) -> str:
    """The lines of other targets, from earlier runs, stay."""
    compiler = subprocess.run([find_compiler().cxx, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    before = path.read_text().splitlines() if path.is_file() else []
    lines = {line.split(":")[0]: line for line in [x for x in before if x.startswith("- ")] + [f"- {o.line()}" for o in outcomes]}
    return "\n".join(["# Fuzzing", "", f"Printed by `scripts/fuzz --report`; {compiler}, {platform.machine()}.", "", *lines.values()]) + "\n"
