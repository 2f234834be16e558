"""The tables, and the page they are put into."""

from __future__ import annotations

from backend_cases import Row
from setup_steps.common import ROOT

from .demo import QUESTIONS, Answers

PAGE = ROOT / "docs" / "results" / "other-backends.md"


def section(backend: str, title: str, tables: list[tuple[str, list[Row]]], demo: list[Answers]) -> str:
    """`tables`: a sentence and its rows."""
    lines = [f"## {title}", "", f"`scripts/other_backends {backend}` printed this. Splits: parts of the graph that run on one device, with slots in use / without a capsule."]
    for sentence, rows in tables:
        lines += ["", sentence] if sentence else []
        lines += ["", "| case | -ngl | NMSE of the logits | at most | splits | tokens in slots | |", "|---|---|---|---|---|---|---|"]
        lines += [_row(r) for r in rows]
    if demo:
        lines += ["", f"The demo model: {', '.join(QUESTIONS)}", "", "| capsule | -ngl | answers | KV of the picture, MiB | smaller |", "|---|---|---|---|---|"]
        lines += [_answers(a) for a in demo]
    return "\n".join(lines) + "\n"


def replace(backend: str, text: str) -> None:
    """Puts this backend's section into the page; the other one stays."""
    begin, end = f"<!-- {backend}, begin -->", f"<!-- {backend}, end -->"
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(begin) + len(begin)] + f"\n{text}" + page[page.index(end) :])


def verdict(row: Row) -> str:
    return "ok" if row.good else _short(row.error) or "DIFFERS"


def _row(r: Row) -> str:
    numbers = f"{r.nmse:.1e} | {r.limit:.0e} | {r.splits} / {r.splits_without} | {r.in_slots}" if not r.error else f"- | {r.limit:.0e} | - | -"
    return f"| {r.case} | {r.ngl} | {numbers} | {verdict(r)} |"


def _answers(a: Answers) -> str:
    if a.error:
        return f"| {a.capsule} | {a.ngl} | {_short(a.error)} | - | - |"
    return f"| {a.capsule} | {a.ngl} | {', '.join(a.texts)} | {a.kv_bytes / 2**20:.2f} | {a.kv_bytes_f16 / a.kv_bytes:.1f}x |"


def _short(error: str) -> str:
    """One cell of a table."""
    return " ".join(error.replace("|", "/").split())[:80]
