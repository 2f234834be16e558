"""Training of the demo models, phase by phase: `scripts/train_demo_model PHASE`.

The first model:
    eye       ViT and projector on per-patch labels                    -> STATE/eye.safetensors
    features  ViT features of training and held-out scenes             -> STATE/features, STATE/held-out
    talk      decoder and projector on those features                  -> STATE/model.safetensors
    joint     everything together, drawing as it goes                  -> STATE/model.safetensors
    export    GGUF files                                               -> --out

The second (--mrope) begins as the first one's shipped GGUF files:
    distil    ViT and merger, taught by the first model's eye          -> STATE/model.safetensors
    joint     everything together on pictures of mixed sizes           -> STATE/model.safetensors
    export    GGUF files                                               -> --out

Each phase but distil starts from what STATE holds; `--init-from MODEL.gguf MMPROJ.gguf` starts from exported weights instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..scenes import HELD_OUT
from .align import align_words
from .export import FIRST, export, init_from
from .features import SHARD, load_eye, write_shard
from .mixed import MixedModel, mixed_prompts
from .places import place_block
from .talk import DemoModel
from .tokenizer import Prompts
from .train_distil import train_distil
from .train_eye import train_eye
from .train_mixed import train_mixed
from .train_talk import train_talk
from .transplant import transplant_decoder, transplant_eye
from .weights import load_weights, save_weights

FEATURE_SEEDS = 5_000_000  # the eye is trained on seeds from 0, the decoder on seeds from here
PHASES = {False: ("eye", "features", "talk", "joint", "export"), True: ("distil", "joint", "export")}


def load(state: Path, given: list[Path], prompts: Prompts) -> DemoModel:
    """The model of `state`, or of the given GGUF files, or a new one that has the eye of `state`."""
    model = DemoModel(len(prompts.tokenizer.pieces))
    if given:
        init_from(model, *given)
    elif (state / "model.safetensors").exists():
        load_weights(state / "model.safetensors", model)
    elif (state / "eye.safetensors").exists():
        eye = load_eye(state / "eye.safetensors")
        model.vision.load_state_dict(eye.vision.state_dict())
        model.heads.load_state_dict(eye.heads.state_dict())
        align_words(model)
    return model


def load_second(state: Path, given: list[Path], prompts: Prompts) -> MixedModel:
    """The model of `state`, or of the given GGUF files."""
    model = MixedModel(prompts)
    if given:
        init_from(model, *given)
    else:
        load_weights(state / "model.safetensors", model)
    return model


def first_model(args: argparse.Namespace) -> None:
    """Run a phase of the first model."""
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
                   budget=args.budget or 256, begin=args.begin, live=args.phase == "joint")
    else:
        print(*export(model, args.out, args.full), sep="\n")


def distil(args: argparse.Namespace, prompts: Prompts, save_to: Path) -> None:
    """Make a second model of the first one."""
    first, model = DemoModel(len(Prompts().tokenizer.pieces)), MixedModel(prompts)
    init_from(first, *FIRST.paths())
    transplant_decoder(first.decoder, model.decoder)
    transplant_eye(first.vision, model.vision)
    train_distil(model.to(args.device), first.vision.to(args.device), save_to, args.minutes, seed=args.seed)
    place_block(model.decoder.cpu(), model.vision.cpu(), first.vision.cpu(), prompts.around_image()[0][0])
    save_weights(model, save_to)


def second_model(args: argparse.Namespace) -> None:
    """Run a phase of the second model."""
    torch.manual_seed(args.seed)
    prompts, save_to = mixed_prompts(), args.state / "model.safetensors"
    if args.phase == "distil":
        distil(args, prompts, save_to)
        return
    model = load_second(args.state, args.init_from, prompts).to(args.device)
    if args.phase == "joint":
        train_mixed(model, prompts, save_to, args.minutes, lr=args.rate, matrix_lr=3 * args.rate, batch=args.batch, budget=args.budget or 448,
                    seed=args.seed, begin=args.begin, workers=args.workers, pairs=args.pairs)
    else:
        print(*export(model, args.out, args.full), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=sorted({p for phases in PHASES.values() for p in phases}))
    parser.add_argument("--mrope", action="store_true", help="the second model")
    parser.add_argument("--state", type=Path, help="folder of checkpoints, default .cache/demo-model or .cache/demo-model-mrope")
    parser.add_argument("--init-from", type=Path, nargs="+", default=[], metavar="GGUF")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--begin", type=float, default=0.0, help="where in the schedule talk and joint begin (talk, 0.75: full resolution)")
    parser.add_argument("--budget", type=int, help="text tokens packed on each picture in talk and joint, default 256, with --mrope 448")
    parser.add_argument("--scenes", type=int, default=8192, help="scenes to cache")
    parser.add_argument("--batch", type=int, default=4, help="joint with --mrope: sequences in a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="joint with --mrope: learning rate of AdamW, a third of Muon's")
    parser.add_argument("--pairs", type=float, default=0.4, help="joint with --mrope: share of steps with two pictures")
    parser.add_argument("--workers", type=int, default=0, help="joint with --mrope: processes that draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for the GGUF files, default: where they are shipped")
    parser.add_argument("--full", action="store_true", help="export F32")
    args = parser.parse_args()
    if args.phase not in PHASES[args.mrope]:
        parser.error(f"{args.phase} is no phase of this model: {', '.join(PHASES[args.mrope])}")
    args.state = args.state or Path(".cache") / ("demo-model-mrope" if args.mrope else "demo-model")
    args.state.mkdir(parents=True, exist_ok=True)
    (second_model if args.mrope else first_model)(args)


if __name__ == "__main__":
    main()
