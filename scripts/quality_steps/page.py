"""The pages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kvcapsule_gguf.eval.intervals import bootstrap
from kvcapsule_gguf.eval.report import as_json, markdown
from kvcapsule_gguf.eval.run import Evaluation, Measured

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "docs" / "results" / "format-study-sealed.md"
FILES = {"demo": "demo-quality.md", "strange": "demo-strange.md", "mrope": "demo-mrope.md", "sealed": "real-sealed.md"}
TITLES = {
    "demo": "Quality: the first demo model",
    "strange": "Quality: the first demo model in an unseen style",
    "mrope": "Quality: the second demo model, pictures of mixed sizes",
    "sealed": "The real decoder: the study's sealed pictures through llama.cpp",
}
CACHES = """\
`built-in` is the capsule that needs no file, `capsule` the fitted one; quality 1 is the default of both. `-vision`: the type on the vision cells alone, the text
stays f16; without it, all cells, which is what llama.cpp's own flags give. `floor` is the f16 cache with attention summed in another order: a KLD of that size is
rounding. `q8_0+q4_0`: keys in q8_0, values in q4_0."""
ABOUT = {
    "demo": "Held-out questions about drawn scenes, and the bundled capsule.\n\n![KL divergence against size](../pictures/quality.svg)\n\n",
    "strange": "The same questions about scenes in a style that neither the model nor its capsule has seen.\n\n",
    "mrope": "Held-out questions about drawn scenes of 280 to 420 pixels each way, and the bundled capsule.\n\n",
    "sealed": """\
The same pictures and questions as in the [last table of the format study](format-study-sealed.md), which was a simulation in torch, f32. Here compression and attention are those of
the library, the weights are F16, and the decoder is the [real one](../design/real-decoder.md). KLD is in nats: the mean over the tokens of a picture's three answers, then over pictures,
with 95 % intervals over pictures. The study's KLD is its ratio times its q4_0, and so are the ends of its interval.\n\n""",
}  # fmt: skip


def page(what: str, model: str, results: Mapping[str, Evaluation], measured: str) -> str:
    """The whole page; measured: where and when (pages_steps.stamp)."""
    parts = [f"# {TITLES[what]}\n\n{ABOUT[what]}{CACHES}\n\n`scripts/quality {what}`, {model}, {measured}.\n"]
    if what == "sealed":
        parts += [delivered(results), *(f"## {suite.capitalize()}\n\n{by_picture(result)}" for suite, result in results.items())]
    else:
        parts += [markdown(as_json(result)) for result in results.values()]
    return "\n".join(parts)


def per_picture(result: Evaluation, m: Measured) -> np.ndarray:
    """f64 [pictures]: mean KLD over the tokens of the answers."""
    _, at = np.unique(result.picture, return_inverse=True)
    tokens = np.array(result.tokens)
    return np.bincount(at, np.array(m.kld) * tokens) / np.bincount(at, tokens)


def by_picture(result: Evaluation) -> str:
    """A row for each cache."""
    rival = next(per_picture(result, m) for m in result.settings if m.setting.name == "q4_0-vision")
    lines = ["| cache of the picture | smaller | KLD | times q4_0-vision | same first token, % |", "|---|---|---|---|---|"]
    for m in result.settings:
        kld = per_picture(result, m)
        pictures = np.arange(len(kld))
        low, high = bootstrap(kld, pictures)
        tlow, thigh = bootstrap(kld, pictures, rival)
        lines.append(f"| {m.setting.name} | {m.bytes_f16 / m.bytes_now:.2f}x | {kld.mean():.6f} ({low:.6f} to {high:.6f}) | {kld.mean() / rival.mean():.3f} ({tlow:.3f} to {thigh:.3f}) "
                     f"| {100 * np.average(m.agree, weights=result.tokens):.1f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def delivered(results: Mapping[str, Evaluation]) -> str:
    """Library and study side by side; the last column says whether the intervals of KLD meet."""
    study, q4_0 = _study(STUDY.read_text(encoding="utf-8"))
    lines = ["| pictures | capsule | smaller | study | KLD | study | times q4_0-vision | intervals meet |", "|---|---|---|---|---|---|---|---|"]
    for suite, result in results.items():
        rival = next(per_picture(result, m) for m in result.settings if m.setting.name == "q4_0-vision")
        for m in result.settings:
            key = re.sub(r"^capsule, ", "", m.setting.name.replace("built-in", "built in"))
            if key not in study:
                continue
            kld = per_picture(result, m)
            pictures = np.arange(len(kld))
            low, high = bootstrap(kld, pictures)
            tlow, thigh = bootstrap(kld, pictures, rival)
            smaller, *times = study[key][suite]
            there, a, b = (x * q4_0[suite] for x in times)
            lines.append(f"| {len(kld)} {suite} | {m.setting.name} | {m.bytes_f16 / m.bytes_now:.2f}x | {smaller:.2f}x | {kld.mean():.5f} ({low:.5f} to {high:.5f}) "
                         f"| {there:.5f} ({a:.5f} to {b:.5f}) | {kld.mean() / rival.mean():.2f} ({tlow:.2f} to {thigh:.2f}) | {'yes' if low <= b and a <= high else '**no**'} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def _study(text: str) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    """Of the study's page: setting -> suite -> [times smaller, KLD in units of q4_0's, both ends of its interval], and q4_0's KLD of each suite."""
    q4_0 = {suite: float(x) for suite, x in re.findall(r"(\w+) (\d\.\d{5})", text[text.index("q4_0's KLD") :].split("\n")[0])}
    rows = {}
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if "quality" in line and len(cells) == 10:
            name = re.sub(r"\.0$", "", cells[0])
            numbers = [[float(x) for x in re.findall(r"[\d.]+", " ".join(cells[i : i + 2]).replace("x", ""))] for i in (1, 6, 8)]
            rows[name] = dict(zip(("composites", "photographs", "pages"), numbers))
    return rows, q4_0

