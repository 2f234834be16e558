"""kvcapsule-eval MODEL --mmproj F --capsule F [--suite scenes|strange|pairs | --images DIR] [--against f16,q8_0,q4_0,drop0.6] [--json] [--report DIR]"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ..chat.files import find_mmproj
from ..format.base_model import read_base_model
from ..format.writer import write_capsule
from ..runtime import interrupts, program
from . import settings, suites
from .report import as_json, markdown, picture
from .run import Evaluation, evaluate
from .vlm import EvalError, Vlm

JOURNAL = "eval.jsonl"
PLAIN_BLOCK = 16  # tokens; a remainder of a picture stays f16


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser("kvcapsule-eval", description="Answers of a model with a compressed cache against its own with an f16 cache.")
    p.add_argument("model", type=Path)
    p.add_argument("--mmproj", type=Path, help="default: beside the model")
    p.add_argument("--capsule", type=Path, action="append", default=[], help="may be given several times")
    p.add_argument("--ratio", default="0.6,0.8", help="presets of the capsules, default %(default)s")
    p.add_argument("--no-guard", action="store_true", help="measure every preset also without the fidelity guard")
    p.add_argument("--suite", choices=sorted(suites.SUITES), default="scenes")
    p.add_argument("--mixed-sizes", action="store_true", help="the suite's pictures in many sizes, 280 to 420 pixels each way, for models that take any")
    p.add_argument("--images", type=Path, metavar="DIR", help="pictures of your own instead; the answers with an f16 cache are the truth")
    p.add_argument("--against", default="f16,q8_0,q4_0,drop0.6", help="default %(default)s; also q8_0-vision, q4_0-vision: of the vision cells alone; f16 is the reference and always first")
    p.add_argument("-n", "--questions", type=int, default=1000)
    p.add_argument("--per-picture", type=int, default=8)
    p.add_argument("-c", "--ctx-size", type=int, default=1024, help="default %(default)s: a picture and its questions")
    p.add_argument("-t", "--threads", type=int, default=min(4, os.cpu_count() or 1))
    p.add_argument("-fa", "--flash-attn", choices=("on", "off"), default="on", help="a quantized cache needs it")
    p.add_argument("--json", action="store_true", help="JSON on stdout instead of the table")
    p.add_argument("--report", type=Path, help="a folder for eval.json, eval.md, eval.png and eval.jsonl; what the last one holds is not measured again")
    p.add_argument("--one-by-one", action="store_true", help="one context at a time, for models whose caches are large")
    p.add_argument("-v", "--verbose", action="store_true")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return program.run("kvcapsule-eval", lambda: _main(parse(argv)))


def _main(args: argparse.Namespace) -> None:
    interrupts.farewell("kvcapsule-eval: interrupted" + (f": the same command goes on ({args.report / JOURNAL})" if args.report else ""))
    data = run(args)
    text = json.dumps(data, indent=1)
    table = markdown(data)
    if args.report:
        (args.report / "eval.json").write_text(text + "\n")
        (args.report / "eval.md").write_text(table)
        picture(args.report / "eval.png", data)
    print(text if args.json else table)


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
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
    if args.images:
        samples = suites.folder(args.images, args.questions, say=to_stderr)
    else:
        draw = suites.mixed_sizes(args.suite) if args.mixed_sizes else None
        samples = suites.SUITES[args.suite](args.questions, args.per_picture, draw)
    with TemporaryDirectory() as folder:
        todo = [vision_only(s, args.model, Path(folder)) for s in todo]
        vlm = Vlm(args.model, mmproj, args.threads, args.verbose)
        try:
            result = evaluate(
                vlm, samples, todo, n_ctx=args.ctx_size, max_questions=args.per_picture, flash_attn=args.flash_attn == "on", keep=not args.one_by_one,
                journal=args.report / JOURNAL if args.report else None, progress=Progress(args.questions),
            )
            return as_json(result)
        finally:
            vlm.close()


def to_stderr(line: str) -> None:
    print(f"kvcapsule-eval: {line}", file=sys.stderr, flush=True)


def vision_only(setting: settings.Setting, model: Path, folder: Path) -> settings.Setting:
    """With the capsule that quantizes the vision cells alone, where that is asked for."""
    if not setting.vision:
        return setting
    capsule = settings.plain_capsule(read_base_model(model), setting.vision, PLAIN_BLOCK)
    path = write_capsule(folder / f"{setting.vision}.gguf", capsule)
    return replace(setting, capsule=path, ratio=capsule.tiers[1].ratio, guard=False)


class Progress:
    """A line on stderr now and then, with the time left."""

    def __init__(self, total: int, every: float = 20.0) -> None:
        self.total, self.every = total, every
        self.start = self.last = time.monotonic()
        self.before: int | None = None  # questions of an interrupted run

    def __call__(self, result: Evaluation) -> None:
        """After every picture that was measured now."""
        done, now = len(result.task), time.monotonic()
        if self.before is None:
            self.before = result.picture.index(result.picture[-1])
        if now - self.last >= self.every:
            self.last = now
            left = (now - self.start) / (done - self.before) * (self.total - done)
            to_stderr(f"{done} of {self.total} questions, {left / 60:.0f} min left")


if __name__ == "__main__":
    sys.exit(main())
