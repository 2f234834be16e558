"""kvcapsule-train MODEL --mmproj F [--images DIR] -o OUT.gguf"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..chat.files import find_mmproj
from ..codec.cut import BlockShape
from ..codec.quality import QUALITY
from ..eval.pictures import Pictures, from_folder
from ..format.base_model import read_base_model
from ..format.capsule import GRID_ROPE_TYPES
from ..format.schema import MAX_BLOCK, MAX_MLP, MAX_NEIGHBOURS, MIN_BLOCK
from ..format.tile_capsule import write_tile_capsule
from ..format.writer import check_place, write_capsule
from ..runtime import interrupts, program
from ..runtime.timing import duration
from .collect import LlamaSource
from .fit_tiles import fit_tile_capsule
from .guard import PASS
from .images import Drawn
from .schedule import LAYER_SCHEDULES, PRESETS
from .source import TrainError
from .trainer import TrainOptions, train

DEFAULT_IMAGES = 96


def parser() -> argparse.ArgumentParser:
    p = program.Parser(
        prog="kvcapsule-train",
        description="Fits a capsule to a vision language model: it looks at pictures, and its keys and values show what can be left out.",
        epilog="Without --images it draws pictures itself: enough for a usable capsule, pictures like those you will use are better.",
    )
    p.add_argument("model", type=Path, metavar="MODEL", help="GGUF of the language model, in any quantization")
    p.add_argument("--mmproj", type=Path, metavar="F", help="its vision projector (default: mmproj*.gguf beside the model)")
    p.add_argument("--images", type=Path, metavar="DIR", help="folder of pictures (default: drawn ones)")
    p.add_argument("--format", type=int, choices=(1, 2), default=1, help="2: the new format (docs/reference/format-v2.md); of the other options it heeds --images, --n-images, --seed, -c, -t and --device (default: %(default)s)")
    p.add_argument("-o", "--output", type=Path, metavar="OUT", help="capsule to write (default: kvcapsule-<model>.gguf beside the model)")
    p.add_argument("--codec", choices=("pca", "retain", "auto"), default="auto", help="of the keys: sequence-level PCA (pca), which loses less, or kept tokens with a predictor (retain), which a CPU reads faster; auto: pca where a CPU reads it as fast as an f16 cache, else retain (default: %(default)s)")
    p.add_argument("--neighbours", type=int, default=TrainOptions.neighbours, metavar="N", help="retain: kept tokens that a dropped one is predicted from; with 2 attention on a CPU takes a fifth less, and the keys lose a tenth more (default: %(default)s)")
    p.add_argument("--mlp", type=int, default=TrainOptions.mlp_width, metavar="N", help="retain: width of the key MLP; one of 16 takes 4 %% off the error of the keys and makes attention on a CPU several times slower; needs torch (default: none)")
    p.add_argument("--layers", choices=LAYER_SCHEDULES, default="uniform", help="how bytes are shared between layers; sensitivity measures on the model what an error costs in each (default: %(default)s)")
    p.add_argument("--loss", choices=("queries", "mse"), default="queries", help="error of the keys as text queries see it, or the plain one, for comparison (default: %(default)s)")
    p.add_argument("--guard", type=float, default=PASS, metavar="SHARE", help="share of the blocks of ordinary pictures that are stored small; the rest, and blocks of stranger pictures, are kept at higher precision (default: %(default)s)")
    p.add_argument("--ratios", type=ratios, default=dict(PRESETS), metavar="R,R,...", help="presets of the file, --ratio of the chat picks one (default: 0.6,0.8,0.875)")
    p.add_argument("--block", type=block, metavar="SHAPE", help="tokens of a block: tile:WxH of the picture's grid, or raster:N consecutive ones, 8..256 tokens (default: tile:8x8, or what divides the grid of the picture)")
    p.add_argument("--n-images", type=int, default=DEFAULT_IMAGES, metavar="N", help="pictures to look at, a quarter of them only calibrates (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="which pictures are drawn or taken (default: %(default)s)")
    p.add_argument("-c", "--ctx-size", type=int, default=8192, metavar="N", help="context while collecting, one picture and a question (default: %(default)s)")
    p.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="CPU threads (default: by the number of cores)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs and key MLPs are trained (default: a GPU if the library and torch have one)")
    p.add_argument("--work", type=Path, metavar="DIR", help="where to keep the state of an unfinished training, as OUT.work: the same command goes on there, and removes it at the end (default: beside OUT)")
    return p


def run(args: argparse.Namespace) -> None:
    """Raises KVCapsuleError."""
    if not 0.5 <= args.guard <= 1:
        raise TrainError(f"--guard {args.guard} is not in 0.5..1")
    if not 1 <= args.neighbours <= MAX_NEIGHBOURS:
        raise TrainError(f"--neighbours {args.neighbours} is not in 1..{MAX_NEIGHBOURS}")
    if not 0 <= args.mlp <= MAX_MLP:
        raise TrainError(f"--mlp {args.mlp} is not in 0..{MAX_MLP}")
    if args.n_images < 4:
        raise TrainError(f"--n-images {args.n_images} is too few: at least 4")
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
    options = TrainOptions(
        codec=args.codec, layers=args.layers, loss=args.loss, guard=args.guard, ratios=args.ratios, block=args.block, seed=args.seed, device=args.device,
        neighbours=args.neighbours, mlp_width=args.mlp,
    )
    work = (args.work or output.parent) / f"{output.name}.work"
    interrupts.farewell("kvcapsule-train: interrupted" + (f": the same command goes on ({work})" if args.format == 1 else ""))
    with LlamaSource(args.model, mmproj, pictures, n_ctx=args.ctx_size, threads=args.threads, device=args.device) as source:
        if args.format == 2:
            tiles = fit_tile_capsule(source.model, [sample for _, sample in source.read()])
            write_tile_capsule(output, tiles)
            say(f"{output}: tiers {', '.join(f'{x:.2f}x' for x in tiles.smaller)}, {output.stat().st_size / 2**20:.1f} MiB, {duration(time.monotonic() - start)}")
            how = tiles.provenance
            say(f"pictures that the axes do not know get {how['smaller']:.2f}x smaller at quality {QUALITY:g}, without a file {how['builtin_smaller']:.2f}x")
            return
        capsule = train(source, options, say, work)
    capsule.provenance["images_from"] = "folder" if args.images else "drawn"
    write_capsule(output, capsule)
    shutil.rmtree(work, ignore_errors=True)
    say(f"{output}: {output.stat().st_size / 2**20:.1f} MiB, {duration(time.monotonic() - start)}")


def block(text: str) -> BlockShape:
    """Raises ArgumentTypeError."""
    try:
        shape = BlockShape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not MIN_BLOCK <= shape.size <= MAX_BLOCK:
        raise argparse.ArgumentTypeError(f"{text}: a block of {shape.size} tokens is not in {MIN_BLOCK}..{MAX_BLOCK}")
    return shape


def ratios(text: str) -> dict[str, float]:
    """"0.6,0.8" -> names and shares. Raises ArgumentTypeError."""
    names = {value: name for name, value in PRESETS.items()}
    try:
        found = sorted({float(x) for x in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: numbers with commas between them, such as 0.6,0.8") from None
    if not all(0.3 <= r <= 0.95 for r in found):
        raise argparse.ArgumentTypeError(f"{text}: every ratio lies in 0.3..0.95")
    return {names.get(r, f"ratio-{r:g}"): r for r in found}


def say(line: str) -> None:
    print(f"kvcapsule-train: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    return program.run("kvcapsule-train", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
