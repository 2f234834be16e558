"""One table: as Markdown, and as JSON with the numbers of every task."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ..plot import Panel, Series, draw
from .intervals import bootstrap, wilson
from .run import Evaluation, Measured

RIVALS = ("q4_0-vision", "q4_0")  # what the KLD is compared with, the first that was measured


def as_json(result: Evaluation) -> dict[str, Any]:
    return {
        "model": result.model,
        "pictures": len(set(result.picture)),
        "questions": len(result.task),
        "answer_tokens": sum(result.tokens),
        "vision_tokens": [min(result.n_vision), max(result.n_vision)],
        "settings": [_row(result, m) for m in result.settings],
    }


def _row(result: Evaluation, m: Measured) -> dict[str, Any]:
    groups, exact, kld = np.array(result.picture), np.array(m.exact, float), np.array(m.kld)
    base, tasks = np.array(result.settings[0].exact, float), np.array(result.task)
    rival = next((x for name in RIVALS for x in result.settings if x.setting.name == name), None)
    return {
        "setting": m.setting.name,
        "kv_ratio": round(m.kv_ratio, 4),
        "times_smaller": round(m.bytes_f16 / m.bytes_now, 2) if m.bytes_now else None,
        "kv_bytes": m.bytes_now,
        "kv_bytes_f16_equivalent": m.bytes_f16,
        "slots": dict(m.slots),
        "exact_match": float(exact.mean()),
        "exact_match_95": wilson(int(exact.sum()), len(exact)),
        "exact_match_change": float((exact - base).mean()),
        "exact_match_change_95": bootstrap(exact - base, groups),
        "lost": int(((base == 1) & (exact == 0)).sum()),
        "won": int(((base == 0) & (exact == 1)).sum()),
        "kld": float(kld.mean()),
        "kld_95": bootstrap(kld, groups),
        "kld_over": _over(kld, rival, groups),
        "kld_p99": float(np.quantile(kld, 0.99)),
        "top_token_agreement": float(np.mean(m.agree)),
        "tasks": {t: _task(exact[tasks == t], base[tasks == t], kld[tasks == t], groups[tasks == t]) for t in sorted(set(result.task))},
        "seconds": round(m.seconds, 1),
    }


def _over(kld: np.ndarray, rival: Measured | None, groups: np.ndarray) -> dict[str, Any] | None:
    """How many times the KLD of the rival on the same questions."""
    if rival is None or not np.any(rival.kld):
        return None
    theirs = np.array(rival.kld)
    return {"setting": rival.setting.name, "times": float(kld.mean() / theirs.mean()), "times_95": bootstrap(kld, groups, theirs)}


def _task(exact: np.ndarray, base: np.ndarray, kld: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    return {
        "questions": len(exact),
        "exact_match": float(exact.mean()),
        "exact_match_change": float((exact - base).mean()),
        "exact_match_change_95": bootstrap(exact - base, groups),
        "kld": float(kld.mean()),
    }


def markdown(data: dict[str, Any]) -> str:
    """Exact match in % with its Wilson interval, the change against the first row and KLD with bootstrap intervals over pictures."""
    over = data["settings"][0]["kld_over"]
    rival = over["setting"] if over else "q4_0's"
    lines = [
        f"{data['model']}: {data['questions']} questions on {data['pictures']} pictures of {_span(data['vision_tokens'])} tokens, "
        f"{data['answer_tokens']} answer tokens forced, against the first row; 95 % intervals",
        "",
        f"| cache of the picture | kv_ratio | smaller | exact match, % | change, points | lost / won | KLD | KLD, times {rival} | KLD, worst 1 % | same first token, % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in data["settings"]:
        low, high = (100 * x for x in r["exact_match_95"])
        dlow, dhigh = (100 * x for x in r["exact_match_change_95"])
        lines.append(
            f"| {r['setting']} | {r['kv_ratio']:.3f} | {r['times_smaller']:.2f}x | {100 * r['exact_match']:.1f} ({low:.1f} to {high:.1f}) "
            f"| {100 * r['exact_match_change']:+.1f} ({dlow:+.1f} to {dhigh:+.1f}) | {r['lost']} / {r['won']} "
            f"| {_small(r['kld'])} ({_small(r['kld_95'][0])} to {_small(r['kld_95'][1])}) | {_times(r)} | {r['kld_p99']:.4f} | {100 * r['top_token_agreement']:.2f} |")
    tasks = list(data["settings"][0]["tasks"])
    if len(tasks) > 1:
        lines += [
            "", "Exact match by task, %, and the change in points with its interval:", "",
            "| cache of the picture | " + " | ".join(f"{t} ({data['settings'][0]['tasks'][t]['questions']})" for t in tasks) + " |", "|---" * (len(tasks) + 1) + "|",
        ]  # fmt: skip
        for r in data["settings"]:
            lines.append(f"| {r['setting']} | " + " | ".join(_cell(r["tasks"][t]) for t in tasks) + " |")
    return "\n".join(lines) + "\n"


def _small(kld: float) -> str:
    return f"{kld:.5f}" if kld == 0 or kld >= 1e-4 else f"{kld:.1e}"


def _times(row: dict[str, Any]) -> str:
    over = row["kld_over"]
    return f"{over['times']:.2f} ({over['times_95'][0]:.2f} to {over['times_95'][1]:.2f})" if over else "-"


def _span(ends: list[int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _cell(task: dict[str, Any]) -> str:
    low, high = (100 * x for x in task["exact_match_change_95"])
    return f"{100 * task['exact_match']:.1f}, {100 * task['exact_match_change']:+.1f} ({low:+.1f} to {high:+.1f})"


def picture(path: Path, data: dict[str, Any]) -> None:
    """Error against bytes. Raises OSError, ValueError."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for r in data["settings"][1:]:
        # qualities of one capsule are a line: their names differ in a number
        family = re.sub(r" -?[0-9.]+", "", r["setting"]) if any(r["slots"].values()) else r["setting"]
        lines.setdefault(family, []).append((8 * r["kv_bytes"] * 2 / r["kv_bytes_f16_equivalent"], max(r["kld"], 1e-7)))
    series = [Series(name, sorted(points)) for name, points in lines.items()]
    draw(path, [Panel(f"{data['model']}: {data['questions']} questions", "bits per value of the picture's cache", "KLD against f16", series, log_y=True)])
