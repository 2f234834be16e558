"""kvcapsule-eval MODEL --mmproj F --capsule F [--suite scenes|strange | --images DIR] [--against f16,q8_0,q4_0,drop0.6] [--json] [--report DIR]"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .. import native
from ..chat.errors import ChatError
from ..chat.files import find_mmproj
from . import settings, suites
from .report import as_json, markdown
from .run import Evaluation, evaluate
from .vlm import EvalError, Vlm


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser("kvcapsule-eval", description="Answers of a model with a compressed cache against its own with an f16 cache.")
    p.add_argument("model", type=Path)
    p.add_argument("--mmproj", type=Path, help="default: beside the model")
    p.add_argument("--capsule", type=Path, action="append", default=[], help="may be given several times")
    p.add_argument("--ratio", default="0.6,0.8", help="presets of the capsules, default %(default)s")
    p.add_argument("--no-guard", action="store_true", help="measure every preset also without the fidelity guard")
    p.add_argument("--suite", choices=sorted(suites.SUITES), default="scenes")
    p.add_argument("--images", type=Path, metavar="DIR", help="pictures of your own instead; the answers with an f16 cache are the truth")
    p.add_argument("--against", default="f16,q8_0,q4_0,drop0.6", help="default %(default)s; f16 is the reference and always first")
    p.add_argument("-n", "--questions", type=int, default=1000)
    p.add_argument("--per-picture", type=int, default=8)
    p.add_argument("-c", "--ctx-size", type=int, default=1024, help="default %(default)s: a picture and its questions")
    p.add_argument("-t", "--threads", type=int, default=min(4, os.cpu_count() or 1))
    p.add_argument("-fa", "--flash-attn", choices=("on", "off"), default="on", help="a quantized cache needs it")
    p.add_argument("--json", action="store_true", help="JSON on stdout instead of the table")
    p.add_argument("--report", type=Path, help="a folder for eval.json and eval.md")
    p.add_argument("-v", "--verbose", action="store_true")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        data = run(args)
    except (EvalError, ChatError, native.NativeError, native.CapsuleError, ValueError) as error:
        print(f"kvcapsule-eval: error: {error}", file=sys.stderr)
        return 1
    text = json.dumps(data, indent=1)
    table = markdown(data)
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
        (args.report / "eval.json").write_text(text + "\n")
        (args.report / "eval.md").write_text(table)
    print(text if args.json else table)
    return 0


def run(args: argparse.Namespace) -> dict:
    mmproj = find_mmproj(args.model, args.mmproj)
    if mmproj is None:
        raise EvalError("no projector: give it with --mmproj")
    names = [name for name in args.against.split(",") if name and name != "f16"]
    todo = settings.rivals(["f16", *names])
    guards = (True, False) if args.no_guard else (True,)
    for capsule in args.capsule:
        todo += settings.capsules(capsule, [float(r) for r in args.ratio.split(",")], guards)
    if len({s.name for s in todo}) < len(todo):  # two files with the same codec
        todo = [replace(s, name=f"{s.name} ({s.capsule.stem})") if s.capsule else s for s in todo]
    samples = suites.folder(args.images, args.questions) if args.images else suites.SUITES[args.suite](args.questions, args.per_picture)
    vlm = Vlm(args.model, mmproj, args.threads, args.verbose)
    try:
        result = evaluate(
            vlm, samples, todo, n_ctx=args.ctx_size, max_questions=args.per_picture,
            flash_attn=args.flash_attn == "on", progress=Progress(args.questions))
        return as_json(result)
    finally:
        vlm.close()


class Progress:
    """A line on stderr now and then."""

    def __init__(self, total: int, every: float = 20.0) -> None:
        self.total, self.every = total, every
        self.last = time.monotonic()

    def __call__(self, result: Evaluation) -> None:
        if time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            print(f"kvcapsule-eval: {len(result.task)} of {self.total} questions", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
