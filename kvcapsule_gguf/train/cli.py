"""kvcapsule-train MODEL --mmproj F [--images DIR] -o OUT.gguf"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..chat.args import number
from ..chat.files import find_mmproj
from ..codec.quality import QUALITY
from ..eval.pictures import Pictures, from_folder
from ..format.base_model import read_base_model
from ..format.capsule import GRID_ROPE_TYPES
from ..format.tile_capsule import TileCapsule, write_tile_capsule
from ..format.writer import check_place
from ..runtime import interrupts, program
from ..runtime.timing import duration
from . import narrow
from .collect import LlamaSource
from .fit_tiles import CODECS, LAYERS, fit_tile_capsule
from .fit_transform import RetainOptions
from .images import Drawn
from .source import TrainError

DEFAULT_IMAGES = 8


def parser() -> argparse.ArgumentParser:
    p = program.Parser(
        prog="kvcapsule-train",
        description="Fits a capsule to a vision language model: it looks at pictures, and its keys and values show what can be left out.",
        epilog="Without --images it draws pictures itself: enough for a usable capsule, pictures like those you will use are better.",
    )
    p.add_argument("model", type=Path, metavar="MODEL", help="GGUF of the language model, in any quantization")
    p.add_argument("--mmproj", type=Path, metavar="F", help="its vision projector (default: mmproj*.gguf beside the model)")
    p.add_argument("--images", type=Path, metavar="DIR", help="folder of pictures (default: drawn ones)")
    p.add_argument("-o", "--output", type=Path, metavar="OUT", help="capsule to write (default: kvcapsule-<model>.gguf beside the model)")
    p.add_argument("--codec", choices=CODECS, default="dct", help="transform of a tile: the DCT, the fastest (dct); learned for each layer, KVCapsule's own PCA along the sequence (learned); or kept tokens that predict the other keys, with learned values, KVCapsule's own method in whole (retain) (default: %(default)s)")
    p.add_argument("--neighbours", type=int, default=RetainOptions.neighbours, metavar="N", help="retain: kept tokens that a dropped one is predicted from (default: %(default)s)")
    p.add_argument("--mlp", type=int, default=RetainOptions.mlp, metavar="N", help="retain: hidden units of the key MLP, which needs torch and makes decoding slower (default: none)")
    p.add_argument("--layers", choices=LAYERS, default=LAYERS[0], help="how bytes are shared between layers: by measured errors, or falling from the first layer to the last as KVCapsule's pyramid (default: %(default)s)")
    p.add_argument("--narrow", choices=narrow.HOW, default="measured", help="heads that need no other picture while a picture is read, for --image-attention auto: measured on prompts with several pictures; all of the deeper half of the layers, MIMIC's rule (deeper-half); or none (default: %(default)s)")
    p.add_argument("--narrow-error", type=number(float, 0), default=narrow.ERROR, metavar="E", help="square of what attention of a layer may lose by narrowing a head, over its own square (default: %(default)s)")
    p.add_argument("--n-images", type=int, default=DEFAULT_IMAGES, metavar="N", help="pictures to look at; 4 have most of the gain (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="which pictures are drawn or taken (default: %(default)s)")
    p.add_argument("-c", "--ctx-size", type=int, default=8192, metavar="N", help="context while collecting, one picture (default: %(default)s)")
    p.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="CPU threads (default: by the number of cores)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs (default: a GPU if the library has one)")
    return p


def run(args: argparse.Namespace) -> None:
    """Raises KVCapsuleError."""
    if args.n_images < 2:
        raise TrainError(f"--n-images {args.n_images} is too few: at least 2, and 4 have most of the gain")
    for path in (args.model, args.mmproj):
        if path is not None and not path.is_file():
            raise TrainError(f"{path} is not a file")
    mmproj = find_mmproj(args.model, args.mmproj)
    if mmproj is None:
        raise TrainError(f"no mmproj*.gguf beside {args.model}: name it with --mmproj")
    output = args.output or args.model.with_name(f"kvcapsule-{args.model.stem}.gguf")
    if not output.parent.is_dir():
        raise TrainError(f"{output.parent} is not a folder")
    check_place(output)
    if args.images:
        pictures: Pictures = from_folder(args.images, args.n_images, args.seed)
    else:
        pictures = Drawn(args.n_images, args.seed, any_size=read_base_model(args.model).rope_type in GRID_ROPE_TYPES)

    start = time.monotonic()
    interrupts.farewell("kvcapsule-train: interrupted")
    with LlamaSource(args.model, mmproj, pictures, n_ctx=args.ctx_size, threads=args.threads, device=args.device) as source:
        samples = list(source.read(say))
        say(f"looked at {len(samples)} pictures in {duration(time.monotonic() - start)}")
        retain = RetainOptions(neighbours=args.neighbours, mlp=args.mlp, seed=args.seed, device=args.device)
        capsule = fit_tile_capsule(source.model, samples, args.codec, retain, args.layers)
        _narrow(source, capsule, args)
    capsule.provenance |= {"images_from": "folder" if args.images else "drawn", "seed": args.seed}
    write_tile_capsule(output, capsule)
    say(f"{output}: tiers {', '.join(f'{x:.2f}x' for x in capsule.smaller)}, {output.stat().st_size / 2**20:.1f} MiB, {duration(time.monotonic() - start)}")
    how = capsule.provenance
    say(f"pictures that the axes do not know get {how['smaller']:.2f}x smaller at quality {QUALITY:g}, without a file {how['builtin_smaller']:.2f}x")


def _narrow(source: LlamaSource, capsule: TileCapsule, args: argparse.Namespace) -> None:
    """Raises KVCapsuleError."""
    if args.narrow == "none":
        return
    errors = narrow.measure(source.vlm, source.model, source.pictures, args.ctx_size, say) if args.narrow == "measured" else np.empty(0)
    if args.narrow == "measured" and not len(errors):
        say("no head is narrowed: the library reads pictures of this model with full attention")
        return
    heads = narrow.narrowed(source.model, args.narrow, errors, args.narrow_error)
    for layer, x in zip(capsule.layers, heads):
        layer.narrow = x if x.any() else None
    capsule.provenance |= {"narrow": args.narrow, **({"narrow_error": args.narrow_error, "narrow_pictures": len(errors)} if len(errors) else {})}
    say(narrow.described(heads))


def say(line: str) -> None:
    print(f"kvcapsule-train: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    return program.run("kvcapsule-train", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
