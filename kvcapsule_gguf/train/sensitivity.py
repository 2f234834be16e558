"""How much an error in the keys or values of a layer costs: one layer after the other is stored coarsely, and the model is asked about pictures.

The cost is the KL divergence of the model's own answers against those with an f16 cache. At small errors it grows with the squared error, so
cost / relative squared error is a weight by which the energies of this layer's rows count in the allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from ..codec.types import legal, row_counts
from ..eval.pictures import Picture
from ..eval.run import Evaluation, evaluate
from ..eval.samples import Asked, Sample
from ..eval.settings import Setting
from ..eval.vlm import Vlm
from ..format.capsule import PCA, Capsule, Tier
from ..format.writer import write_capsule
from ..runtime.timing import Progress
from .schedule import MAX_GROUPS, PROBE_PICTURES

QUESTIONS = (  # about a picture that has none of its own
    "What is in the image?",
    "Read the text in the image.",
    "How many objects are there, and what colours are they?",
    "Where is the largest object? Is anything to the left of it?",
    "Describe the picture in detail.",
)
SHRINK = 0.25  # towards the mean of all, on a log scale: pictures are few and the tail of the KLD is long


def groups(n_layers: int, most: int = MAX_GROUPS) -> list[range]:
    """Consecutive layers, as equal in number as possible."""
    edges = np.linspace(0, n_layers, min(n_layers, most) + 1).round().astype(int)
    return [range(a, b) for a, b in zip(edges, edges[1:])]


def probes(capsule: Capsule) -> list[tuple[str, range, Capsule]]:
    """("k" or "v", layers, a capsule that stores only these coarsely, everything else in f16)."""
    n, layers = capsule.block_size, capsule.layers
    fine = [row_counts(f16=n)] * len(layers)
    out = []
    for group in groups(len(layers)):
        for kind in "kv":
            rows = [legal(row_counts(q2_0=n), x.key_length if kind == "k" else x.value_length) if i in group else f for i, (x, f) in enumerate(zip(layers, fine))]
            economy = Tier("probe", [PCA] * len(layers), rows if kind == "k" else fine, rows if kind == "v" else fine, [0.0] * len(layers))
            probe = replace(capsule, tiers=[Tier("faithful", [PCA] * len(layers), fine, fine, [0.0] * len(layers)), economy])
            out.append((kind, group, probe))
    return out


def measure(
    vlm: Vlm, pictures: Iterable[Picture], n_ctx: int, capsule: Capsule, folder: Path, say: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray]:
    """(f64 [L] of the keys, of the values): KLD for each unit of relative squared error, on the first pictures; the model's own answers are the truth.

    An interrupted measurement goes on in `folder`."""
    todo = probes(capsule)
    settings = [Setting("f16")]
    for number, (_, _, probe) in enumerate(todo):
        path = write_capsule(folder / f"probe{number}.gguf", probe)
        settings.append(Setting(path.stem, capsule=path, ratio=probe.tiers[1].ratio, guard=False))
    samples = [
        Sample(picture.name, [picture.image], [Asked("probe", q, None) for q in picture.questions or QUESTIONS]) for picture in islice(pictures, PROBE_PICTURES)
    ]
    total = sum(len(sample.questions) for sample in samples)
    say(f"sensitivity of {len(capsule.layers)} layers: {len(todo)} probes on {len(samples)} pictures")
    tell = Progress("questions to the probes", say)

    def progress(result: Evaluation, before: int) -> None:
        tell(len(result.task), total, before)

    journal = folder / "probes.jsonl"
    result = evaluate(vlm, samples, settings, n_ctx=n_ctx, flash_attn=False, keep=False, journal=journal, progress=progress)
    return weights([(kind, group) for kind, group, _ in todo], np.array([m.kld for m in result.settings[1:]]), len(capsule.layers))


def weights(todo: Sequence[tuple[str, range]], kld: np.ndarray, n_layers: int) -> tuple[np.ndarray, np.ndarray]:
    """kld [probes, questions] -> weights of the keys and values of every layer, mean 1; the KLD of a group is shared by its layers."""
    mean = np.maximum(kld.mean(1), 1e-12)
    each = np.array([m / len(group) for m, (_, group) in zip(mean, todo)])
    each = np.exp((1 - SHRINK) * np.log(each) + SHRINK * np.log(each).mean())
    out = {kind: np.zeros(n_layers) for kind in "kv"}
    for w, (kind, group) in zip(each, todo):
        out[kind][list(group)] = w
    total = np.concatenate([out["k"], out["v"]]).mean()
    return out["k"] / total, out["v"] / total
