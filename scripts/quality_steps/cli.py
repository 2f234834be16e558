"""Which model sees which pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pages_steps.stamp import stamp

from kvcapsule_gguf.eval import settings, suites
from kvcapsule_gguf.eval.report import as_json
from kvcapsule_gguf.eval.run import Evaluation, evaluate
from kvcapsule_gguf.eval.samples import Asked, Sample
from kvcapsule_gguf.eval.vlm import Vlm
from kvcapsule_gguf.runtime.program import run
from kvcapsule_gguf.runtime.timing import Progress
from kvcapsule_gguf.study.pictures import Study, studies

from . import page

ROOT = Path(__file__).resolve().parents[2]
KEPT, RESULTS, DEMO = ROOT / ".cache" / "quality", ROOT / "docs" / "results", ROOT / "kvcapsule_gguf" / "demo"
TYPES = ("q8_0", "q8_0+q4_0", "q4_0")
VISION = [f"{name}-vision" for name in TYPES]
AGAINST = [*TYPES, *VISION]
DROPPED = ["drop0.6", "drop0.8"]
VISION_ONLY = ("photographs", "pages")  # suites of the real decoder that are not measured with these types on all cells, which takes as long as all other settings
QUALITIES = [0.5, 0.75, 1.0, 1.5]
SEALED = {"composites": 24, "photographs": 16, "pages": 24}  # pictures, as in docs/results/format-study-sealed.md
WRITTEN = 8  # tokens that the real decoder writes itself, as there
QUESTIONS, PER_SEALED = 8, 3  # about a picture


@dataclass(frozen=True)
class Subject:
    """A model, its capsule, and what it is asked."""

    name: str
    model: Path
    mmproj: Path
    capsule: Path
    against: list[str]
    written: int = 48


def subject(name: str, found: dict[str, Study], capsule: Path | None) -> Subject:
    study = found[{"strange": "demo", "sealed": "real"}.get(name, name)]
    if name == "sealed":
        return Subject(name, study.decoder, study.mmproj, capsule or study.decoder.parent / "kvcapsule-real.gguf", AGAINST, WRITTEN)
    fitted = next(study.decoder.parent.glob("kvcapsule-*.gguf"))
    return Subject(name, study.decoder, study.mmproj, fitted, AGAINST if name == "mrope" else AGAINST + DROPPED)


def sealed(study: Study, suite: str) -> Iterable[Sample]:
    """The pictures and questions of the study's last table."""
    for i, (image, questions) in enumerate(islice(study.items(suite), SEALED[suite])):
        yield Sample(f"sealed {i}", [image], [Asked(suite, prompt, answer) for prompt, answer in questions[:PER_SEALED]])


def measure(vlm: Vlm, of: Subject, suite: str, samples: Iterable[Sample], questions: int) -> Evaluation:
    """All settings; what .cache/quality has is not measured again."""
    todo = [settings.Setting("f16"), *settings.rivals(VISION)] if suite in VISION_ONLY else [settings.Setting("f16"), settings.FLOOR, *settings.rivals(of.against)]
    todo += settings.capsules(Path(settings.BUILT_IN), QUALITIES, []) + settings.capsules(of.capsule, QUALITIES, [])
    folder = KEPT / of.name
    folder.mkdir(parents=True, exist_ok=True)
    tell = Progress("questions", lambda line: print(line, flush=True))
    return evaluate(vlm, samples, todo, n_ctx=1024, max_questions=QUESTIONS, journal=folder / f"{suite}.jsonl", max_written=of.written,
                    progress=lambda result, before: tell(len(result.task), questions, before))  # fmt: skip


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("what", choices=tuple(page.FILES))
    p.add_argument("-n", "--questions", type=int, default=1000, help="of a suite (default: %(default)s)")
    p.add_argument("--real", type=Path, default=ROOT / ".cache" / "real-decoder" / "out", help="folder of the real decoder")
    p.add_argument("--capsule", type=Path, help="of the real decoder (default: kvcapsule-real.gguf in its folder)")
    p.add_argument("--measured", help="machine, commit and date, where all was measured before (default: these)")
    args = p.parse_args()
    return run("quality", lambda: _main(args))


def _main(args: argparse.Namespace) -> None:
    found = studies(DEMO, args.real if args.what == "sealed" else None)
    of = subject(args.what, found, args.capsule)
    vlm = Vlm(of.model, of.mmproj, threads=1)
    try:
        results = {}
        for suite in SEALED if args.what == "sealed" else ["strange" if args.what == "strange" else "scenes"]:
            if args.what == "sealed":
                study = Study("real", of.model, of.mmproj, 0, args.real / "suites", sealed=True)
                samples, n = sealed(study, suite), PER_SEALED * SEALED[suite]
            else:
                draw = suites.mixed_sizes(suite) if args.what == "mrope" else None
                samples, n = suites.SUITES[suite](args.questions, QUESTIONS, draw), args.questions
            results[suite] = measure(vlm, of, suite, samples, n)
    finally:
        vlm.close()
    (RESULTS / page.FILES[args.what]).write_text(page.page(args.what, of.model.stem, results, args.measured or stamp()), encoding="utf-8")
    if args.what == "demo":
        (RESULTS / "demo-quality.json").write_text(json.dumps(as_json(results["scenes"]), indent=1) + "\n", encoding="utf-8")
