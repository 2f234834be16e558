"""kvcapsule-eval MODEL --mmproj F --capsule F [--suite scenes|strange|pairs|composites|photographs|pages|words|several | --images DIR] [--against q8_0,q8_0+q4_0,q4_0-vision,drop0.6] [--json] [--report DIR]"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..chat.capsules import beside
from ..chat.files import AUTO, BUILT_IN, check_model, find_mmproj
from ..runtime import interrupts, program
from ..runtime.timing import Progress
from . import settings, suites
from .report import as_json, markdown, picture
from .run import Evaluation, evaluate
from .vlm import EvalError, Vlm

JOURNAL = "eval.jsonl"
AGAINST = "q8_0,q4_0,drop0.6"


def parser() -> argparse.ArgumentParser:
    p = program.Parser("kvcapsule-eval", description="Answers of a model with a compressed cache against its own with an f16 cache.")
    p.add_argument("model", type=Path, metavar="MODEL", help="GGUF file of the model")
    p.add_argument("--mmproj", type=Path, metavar="FILE", help="vision projector (default: mmproj*.gguf beside the model)")
    p.add_argument("--capsule", type=Path, action="append", default=[], metavar="FILE|auto|built-in|off", help="a capsule to measure; may be given several times (default: auto, as in kvcapsule-chat; off: none)")
    p.add_argument("--quality", type=_qualities, default=[], metavar="Q,Q,...", help="qualities of the capsules (default: each capsule's own)")
    p.add_argument("--ratio", type=_ratios, default=[], metavar="R,R,...", help="tiers of the capsules, by the share of the bytes that they save (default: none)")
    p.add_argument("--image-attention", choices=("auto", "full"), default="full", help="auto: each capsule also with heads narrowed that need no other picture while a picture is read, with and without compression (default: %(default)s)")
    p.add_argument("--suite", choices=sorted(suites.SUITES), default="scenes", help="pictures and questions (default: %(default)s)")
    p.add_argument("--mixed-sizes", action="store_true", help="the suite's pictures in many sizes, 280 to 420 pixels each way, for models that take any")
    p.add_argument("--images", type=Path, metavar="DIR", help="pictures of your own instead; the answers with an f16 cache are the truth")
    p.add_argument(
        "--against", default=AGAINST, metavar="NAME,...",
        help="caches to compare with (default: %(default)s); also q5_0 and iq4_nl, two types for keys and values (q8_0+q4_0), either for the vision cells alone (q4_0-vision). "
        "f16, the reference, is always first, then its floor: f16 again with attention summed in another order, so a KLD of that size is rounding",
    )  # fmt: skip
    p.add_argument("-n", "--questions", type=_count, default=1000, metavar="N", help="how many questions (default: %(default)s)")
    p.add_argument("--per-picture", type=_count, default=8, metavar="N", help="questions about each picture (default: %(default)s)")
    p.add_argument("-c", "--ctx-size", type=int, default=1024, metavar="N", help="context, for a picture and its questions (default: %(default)s)")
    p.add_argument("-t", "--threads", type=_count, default=min(4, os.cpu_count() or 1), metavar="N", help="CPU threads (default: 4, or as many cores as there are)")
    p.add_argument("-fa", "--flash-attn", choices=("on", "off"), default="on", help="flash attention, which a quantized cache needs (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="JSON on stdout instead of the table")
    p.add_argument("--report", type=Path, metavar="DIR", help="a folder for eval.json, eval.md, eval.png and eval.jsonl; what the last one holds is not measured again")
    p.add_argument("--one-by-one", action="store_true", help="one context at a time, for models whose caches are large")
    p.add_argument("-v", "--verbose", action="store_true", help="show llama.cpp's own log")
    return p


def _count(text: str) -> int:
    """Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def _ratios(text: str) -> list[float]:
    return _numbers(text, 1, "0.6,0.8")


def _qualities(text: str) -> list[float]:
    return _numbers(text, 100, "0.5,0.7")


def _numbers(text: str, most: int, example: str) -> list[float]:
    """Raises ArgumentTypeError."""
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < most for number in numbers):
        raise argparse.ArgumentTypeError(f"{text}: numbers between 0 and {most} with commas between them, such as {example}")
    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    return program.run("kvcapsule-eval", lambda: _main(parser().parse_args(argv)))


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
    mmproj = find_mmproj(check_model(args.model), args.mmproj)
    if mmproj is None:
        raise EvalError("no projector: give it with --mmproj")
    names = [name for name in args.against.split(",") if name not in ("", "f16", settings.FLOOR.name)]
    todo = [settings.Setting("f16"), settings.FLOOR, *settings.rivals(names)]
    for capsule in named_capsules(args.capsule, args.model, mmproj):
        todo += settings.capsules(capsule, args.quality, args.ratio, args.image_attention == "auto")
    if len({s.name for s in todo}) < len(todo):  # two files
        todo = [replace(s, name=f"{s.name} ({s.capsule.stem})") if s.capsule else s for s in todo]
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
    own = suites.OwnPictures(args.images, args.questions, args.per_picture, to_stderr) if args.images else None
    draw = suites.mixed_sizes(args.suite) if args.mixed_sizes else None
    samples = own or suites.SUITES[args.suite](args.questions, args.per_picture, draw)
    tell = Progress("questions", to_stderr)

    def progress(result: Evaluation, before: int) -> None:
        tell(len(result.task), own.questions if own else args.questions, before)

    vlm = Vlm(args.model, mmproj, args.threads, args.verbose)
    try:
        if vlm.many_positions:
            todo = without_drop(todo, asked=args.against != AGAINST)
        result = evaluate(
            vlm, samples, todo, n_ctx=args.ctx_size, max_questions=args.per_picture, flash_attn=args.flash_attn == "on", keep=not args.one_by_one,
            journal=args.report / JOURNAL if args.report else None, progress=progress,
        )
        return as_json(result)
    finally:
        vlm.close()


def named_capsules(named: list[Path], model: Path, mmproj: Path) -> list[Path]:
    """Raises KVCapsuleError."""
    found = []
    for path in named or [Path(AUTO)]:
        if str(path) == AUTO:
            path = beside(model, mmproj) or Path(BUILT_IN)
        if str(path) != "off":
            found.append(path)
    return found


def without_drop(todo: list[settings.Setting], asked: bool) -> list[settings.Setting]:
    """Of a model whose vision tokens share positions, which are what tokens are removed by. asked: the user wants them. Raises EvalError."""
    names = ", ".join(s.name for s in todo if s.drop)
    if names and asked:
        raise EvalError(f"--against {names}: tokens cannot be dropped from a model with M-RoPE")
    if names:
        to_stderr(f"{names} is left out: tokens cannot be dropped from a model with M-RoPE")
    return [s for s in todo if not s.drop]


def to_stderr(line: str) -> None:
    print(f"kvcapsule-eval: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
