"""Samples in, capsule out."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..codec.cut import BlockShape
from ..codec.types import Q4_0, row_counts
from ..format.base_model import BaseModel, licence_of
from ..format.capsule import GRID_ROPE_TYPES, PCA, RETAIN, Capsule, Layer, Tier
from ..format.fingerprint import base_of
from ..runtime.scratch import Scratch
from ..runtime.timing import Progress, duration, remaining
from .fit_pca import fit_basis
from .fit_retain import RetainOptions, fit_retain
from .guard import PASS, calibrate
from .schedule import PRESETS, PROBE_PICTURES, Part, faithful_rows, probe_count, retain_rows, schedule
from .shapes import plan
from .source import KVSource, TrainError
from .speed import choose_codec
from .store import MEMORY, STATE, BlockStore, full

FEW = 16  # pictures
SETTINGS = "settings.json"  # of a state


@dataclass(frozen=True)
class TrainOptions:
    codec: str = "auto"  # of the keys of the economy tiers: pca, retain, or what speed.choose_codec says
    layers: str = "uniform"  # one of schedule.LAYER_SCHEDULES
    guard: float = PASS  # share of blocks of ordinary pictures that may take the economy tier
    loss: str = "queries"  # the keys' error as text queries see it, or "mse": the plain one
    block: BlockShape | None = None  # None: chosen from the first picture
    seed: int = 0
    memory: int = MEMORY  # store.MEMORY
    kept: float = 0.4  # retain: share of the tokens that are kept
    neighbours: int = 4  # retain: kept tokens that a dropped one is predicted from; with 2 attention takes a fifth less, and keys lose more
    mlp_width: int = 0  # retain: of the key MLP; one of 16 takes 4 % off the error, and keys have to be rebuilt (docs/results/decode-cpu.md)
    device: str = "auto"  # of the key MLPs: cpu, cuda, or what torch finds
    ratios: dict[str, float] = field(default_factory=lambda: dict(PRESETS))


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def train(source: KVSource, options: TrainOptions, say: Callable[[str], None] = to_stderr, work: Path | None = None) -> Capsule:
    """work: keeps the state (state_folder), an interrupted training goes on there; None: a temporary folder.
    Raises TrainError."""
    with Scratch() if work is None else nullcontext(work) as folder, collect(source, options, say, folder) as store:
        return fit(source, store, options, say)


def collect(source: KVSource, options: TrainOptions, say: Callable[[str], None], work: Path) -> BlockStore:
    """The blocks of all pictures that fit (shapes.plan). Raises TrainError."""
    block, pictures = plan(source.model, source.shapes(say), options.block, say)
    numbers, total, start = [p.number for p in pictures], len(pictures), time.monotonic()
    folder = state_folder(work, source, options, block, numbers, say)
    store = BlockStore(source.model, block, folder, expected=total, seed=options.seed, memory=options.memory)
    try:
        before = store.images
        if before:
            say(f"going on after {before} of {total} pictures ({store.folder})")
        tell = Progress("pictures", say)
        for number, sample in source.read(numbers[before:]):
            store.add(number, sample)
            if store.images == 1:
                _announce(store, len(sample.keys[0]), total, time.monotonic() - start, options, say)
            tell(store.images, total, before)
        if not any(store.held) or all(store.held):
            raise TrainError(f"{store.images} pictures are too few: at least 4 are needed, 16 make a usable capsule, 64 or more a good one")
        if store.images < FEW:
            say(f"only {store.images} pictures: {FEW} make a usable capsule, 64 or more a good one")
    except BaseException:
        store.__exit__()
        raise
    say(f"looked at {store.images} pictures in {duration(time.monotonic() - start)}")
    return store


def state_folder(work: Path, source: KVSource, options: TrainOptions, block: BlockShape, numbers: list[int], say: Callable[[str], None]) -> Path:
    """In `work`, of its own for everything that decides what is kept: a command that was put right starts anew, and the first one can still go on.
    Says so where only the pictures are others, which may be by mistake. Raises TrainError."""
    model, pictures = source.model, source.identity.splitlines()
    command = [model.architecture, model.name, base_of(model).fingerprint, str(block), options.seed, options.memory]
    text = json.dumps([command, numbers, pictures])
    folder = work / hashlib.sha256(text.encode()).hexdigest()[:12]
    for state in sorted(work.glob(f"*/{STATE}")) if not folder.exists() else ():
        with suppress(OSError, ValueError):  # its settings were cut short, or are none of ours
            its_command, _, its_pictures = json.loads(state.with_name(SETTINGS).read_text())
            if its_command == command:
                names = sorted({line.partition(" ")[2] for line in {*its_pictures} ^ {*pictures}}) or ["their number"]
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                say(f"other pictures than in the unfinished training in {state.parent}, so this one starts anew; different: {', '.join(names[:3])}{more}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).write_text(text)
    except OSError as error:
        raise full(folder, error) from None
    return folder


def _announce(store: BlockStore, tokens: int, total: int, seconds: float, options: TrainOptions, say: Callable[[str], None]) -> None:
    """What is to come, from the first picture. Raises TrainError when the disk can not hold it."""
    blocks = len(store.held) * total
    need, free = blocks * store.disk_bytes_block, shutil.disk_usage(store.folder).free
    say(
        f"a picture takes {tokens} tokens and {seconds:.1f} s: about {duration(seconds * total)} to look at {total} pictures, "
        f"{need / 2**20:.0f} MiB of disk in {store.folder}"
    )
    if options.layers == "sensitivity":
        # every probe looks at its pictures again
        looks = probe_count(len(store.model.kv_layers)) * min(PROBE_PICTURES, total)
        say(f"then about {duration(seconds * looks)} to measure the sensitivity of the layers (--layers uniform goes without), and minutes to fit")
    if need > free:
        raise TrainError(f"{store.folder} has {free / 2**20:.0f} MiB free, {need / 2**20:.0f} are needed: fewer --n-images, or another disk")


@dataclass(frozen=True)
class FittedLayer:
    layer: Layer
    keys: Part
    values: Part
    retain_energy: np.ndarray | None  # f64 [N] of the rows of a `retain` list


def fit(source: KVSource, store: BlockStore, options: TrainOptions, say: Callable[[str], None]) -> Capsule:
    """Raises TrainError."""
    model, n = store.model, store.block_size
    grid = model.rope_type in GRID_ROPE_TYPES
    width = store.block.tile_width or (next(iter(store.widths)) if len(store.widths) == 1 else 0)
    if options.codec == "auto":
        codec, why = choose_codec(model, store.block, width)
        options = replace(options, codec=codec)
        say(why)
    fitted: list[FittedLayer] = []
    start = time.monotonic()
    for i, index in enumerate(model.kv_layers):
        f = fit_layer(model, store, i, width, options)
        fitted.append(f)
        share = [100 * p.energy[: n // 2].sum() for p in (f.keys, f.values)]
        say(
            f"layer {index}: half of the rows hold {share[0]:.1f} % of the keys, {share[1]:.1f} % of the values; "
            f"{remaining(start, i + 1, len(model.kv_layers))} left to fit"
        )
    # one number of tokens for pictures of several shapes: the projector's grid is fixed
    tokens = next(iter(store.image_tokens)) if len(store.image_tokens) == 1 and not grid else 0
    capsule = Capsule(
        base=base_of(model),
        block_size=n,
        layers=[f.layer for f in fitted],
        tiers=[_faithful(fitted, n)],
        name=f"KVCapsule for {model.name}",
        block_shape=store.block.kind,
        block_width=width,
        image_tokens=tokens if tokens % n == 0 else 0,
        neighbour_count=options.neighbours if options.codec == "retain" else 0,
        default_ratio=options.ratios.get("default", 0.8),
        provenance={
            "tool": "kvcapsule-train", "images": store.images, "blocks": len(store.held), "seed": options.seed, "codec": options.codec,
            "layers": options.layers, "loss": options.loss, "guard": options.guard, **licence_of(model),
        },
    )  # fmt: skip
    weights = None
    if options.layers == "sensitivity":
        weights = source.sensitivity(capsule, store.folder, say)
        capsule.provenance |= {"key_sensitivity": weights[0].tolist(), "value_sensitivity": weights[1].tolist()}
    capsule.tiers += [_economy(name, ratio, fitted, n, options, weights) for name, ratio in sorted(options.ratios.items(), key=lambda x: x[1])]
    capsule.set_ratios()
    calibrate(capsule, store, say, weights, options.guard)
    return capsule


def fit_layer(model: BaseModel, store: BlockStore, i: int, width: int, options: TrainOptions) -> FittedLayer:
    """KV layer number i, on the images that are not held back."""
    index, n = model.kv_layers[i], store.block_size
    queries = store.query_weight(i)
    weight = queries if options.loss == "queries" else np.ones_like(queries)
    keys = store.blocks(i, "k", held=False)
    k, v = fit_basis(keys, weight), fit_basis(store.blocks(i, "v", held=False))
    layer = Layer(
        index=index,
        head_count_kv=model.head_count_kv[index],
        key_length=model.key_length[index],
        value_length=model.value_length[index],
        k_mean=k.mean,
        v_mean=v.mean,
        k_basis=k.rows,
        v_basis=v.rows,
        k_query_weight=queries,
        rope=model.layer_rope[index],
        freq_base=model.freq_base[index],
    )
    retain_energy = None
    if options.codec == "retain":
        m = max(1, min(n - 1, round(options.kept * n)))
        kept_rows = row_counts(q4_0=m) if Q4_0.fits(layer.key_length) else row_counts(f16=m)
        shape = RetainOptions(m, options.neighbours, options.mlp_width, width, seed=options.seed, device=options.device)
        retain, retain_energy = fit_retain(keys, weight, model.rope_type if layer.rope else "none", model.rope_dimensions, shape, kept_rows)
        layer.token_order = retain.order.astype(np.uint16)
        layer.kept_count, layer.mlp_width = m, options.mlp_width
        layer.k_gate, layer.k_neighbours = retain.gate, retain.neighbours.astype(np.int32)
        if options.mlp_width:
            layer.k_mlp_up, layer.k_mlp_up_bias, layer.k_mlp_down = retain.mlp_up, retain.mlp_up_bias, retain.mlp_down
    heads = layer.head_count_kv
    return FittedLayer(layer, Part(_relative(k.energy), layer.key_length, heads), Part(_relative(v.energy), layer.value_length, heads), retain_energy)


def _relative(energy: np.ndarray) -> np.ndarray:
    total = energy.sum()
    return energy / total if total > 0 else np.full(len(energy), 1 / len(energy))


def _faithful(fitted: list[FittedLayer], n: int) -> Tier:
    rows = [(faithful_rows(n, f.keys.d), faithful_rows(n, f.values.d)) for f in fitted]
    return Tier("faithful", [PCA] * len(rows), [k for k, _ in rows], [v for _, v in rows], [0.0] * len(rows))


def _economy(
    name: str, ratio: float, fitted: list[FittedLayer], n: int, options: TrainOptions, weights: tuple[np.ndarray, np.ndarray] | None = None
) -> Tier:
    key_rows, value_rows = schedule([f.keys for f in fitted], [f.values for f in fitted], n, ratio, options.layers, weights)
    codec = [PCA] * len(fitted)
    if options.codec == "retain":
        codec = [RETAIN] * len(fitted)
        # the bytes that pca would take; layers that share their rows there share them here
        energies = {rows: [f.retain_energy for f, r in zip(fitted, key_rows) if r == rows] for rows in key_rows}
        key_rows = [
            retain_rows(np.mean(energies[rows], 0), f.layer.kept_count, f.keys.d, 1 - f.keys.bytes(rows) / (2 * n * f.keys.heads * f.keys.d))
            for f, rows in zip(fitted, key_rows)
        ]
    return Tier(name, codec, key_rows, value_rows, [0.0] * len(fitted))
