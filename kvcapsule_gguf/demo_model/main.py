"""Training of the demo model, phase by phase: `scripts/train_demo_model PHASE`.

    eye       ViT and projector on per-patch labels                    -> STATE/eye.safetensors
    features  ViT features of training and held-out scenes             -> STATE/features, STATE/held-out
    talk      decoder and projector on those features                  -> STATE/model.safetensors
    joint     everything together, drawing as it goes                  -> STATE/model.safetensors
    export    GGUF files                                               -> --out

Each phase starts from what STATE holds; `--init-from MODEL.gguf MMPROJ.gguf` starts from exported weights instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..scenes import HELD_OUT
from .align import align_words
from .export import export, init_from
from .features import SHARD, load_eye, write_shard
from .talk import DemoModel
from .tokenizer import Prompts
from .train_eye import train_eye
from .train_talk import load_model, train_talk

FEATURE_SEEDS = 5_000_000  # the eye is trained on seeds from 0, the decoder on seeds from here


def load(state: Path, given: list[Path], prompts: Prompts) -> DemoModel:
    """The model of `state`, or of the given GGUF files, or a new one that has the eye of `state`."""
    model = DemoModel(len(prompts.tokenizer.pieces))
    if given:
        init_from(model, *given)
    elif (state / "model.safetensors").exists():
        load_model(state / "model.safetensors", model)
    elif (state / "eye.safetensors").exists():
        eye = load_eye(state / "eye.safetensors")
        model.vision.load_state_dict(eye.vision.state_dict())
        model.heads.load_state_dict(eye.heads.state_dict())
        align_words(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("eye", "features", "talk", "joint", "export"))
    parser.add_argument("--state", type=Path, default=Path(".cache/demo-model"), help="folder of checkpoints")
    parser.add_argument("--init-from", type=Path, nargs="+", default=[], metavar="GGUF")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--begin", type=float, default=0.0, help="where in the schedule talk begins (0.75: full resolution)")
    parser.add_argument("--budget", type=int, default=256, help="text tokens packed on each picture in talk and joint")
    parser.add_argument("--scenes", type=int, default=8192, help="scenes to cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "demo")
    parser.add_argument("--full", action="store_true", help="export F32")
    args = parser.parse_args()
    args.state.mkdir(parents=True, exist_ok=True)
    prompts = Prompts()
    features, held_out = args.state / "features", args.state / "held-out"
    if args.phase == "eye":
        train_eye(args.state, args.minutes, device=args.device, seed=args.seed)
        return
    model = load(args.state, args.init_from, prompts).to(args.device)
    if args.phase == "features":
        for folder in (features, held_out):
            folder.mkdir(exist_ok=True)
        write_shard(model.vision.eval(), held_out, HELD_OUT.start, random_words=0.0)
        for start in range(FEATURE_SEEDS, FEATURE_SEEDS + args.scenes, SHARD):
            write_shard(model.vision, features, start)
    elif args.phase in ("talk", "joint"):
        train_talk(model, prompts, features, held_out, args.state / "model.safetensors", args.minutes, seed=args.seed,
                   budget=args.budget, begin=args.begin, live=args.phase == "joint")
    else:
        print(*export(model, args.out, args.full), sep="\n")


if __name__ == "__main__":
    main()
