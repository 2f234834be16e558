"""Where the hooks of the patch series (a hook is a hunk of a patch) are in a llama.cpp tree that may be another version. Nothing is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .patching import Series

TAG = "[TAG_CAPSULE]"
FUZZ = 2  # context lines at either end that may differ, as patch(1) has it
SOURCES = (".c", ".cpp", ".h", ".hpp", ".cu", ".cuh", ".m", ".txt")
LEAST_ANCHOR = 12  # characters: shorter lines are everywhere


@dataclass
class Hook:
    """`old` and `new` are the lines of the hunk before and after, with `lead` and `tail` lines of context around the change."""

    patch: str
    file: str
    start: int  # of `old` in the file, from 0
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    lead: int = 0
    tail: int = 0
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    @property
    def lines(self) -> int:
        return len(self.added) + len(self.removed)

    @property
    def title(self) -> str:
        tagged = [line for line in self.added if TAG in line]
        return (tagged or self.added or self.removed)[0].replace(f"// {TAG}", "").replace(f"# {TAG}", "").strip()

    @property
    def anchors(self) -> list[str]:
        """Lines of the old text that say where it was: those that it replaces, then the nearest context."""
        around = self.old[: self.lead][::-1] + self.old[len(self.old) - self.tail :]
        return [line for line in self.removed + around if len(line.strip()) >= LEAST_ANCHOR and not line.startswith("#include")]


@dataclass(frozen=True)
class Finding:
    """kind: applies, offset, fuzz, moved (its anchor is still there) or vanished."""

    hook: Hook
    kind: str
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.kind in ("applies", "offset", "fuzz")

    def __str__(self) -> str:
        return f"{self.hook.patch[:4]} {self.hook.file}: {self.kind}{self.detail and ' ' + self.detail}: {self.hook.title}"


def hooks(series: Series) -> list[Hook]:
    return [hook for patch in series.patches for hook in _parse(patch)]


def check(series: Series, tree: Path, texts: dict[str, list[str] | None] | None = None) -> list[Finding]:
    """One finding for each hook, in order; hooks that were found are applied in memory for those behind them.

    texts: becomes the lines of each file with its hooks, None for a file that is not there."""
    texts = {} if texts is None else texts
    grown: dict[tuple[str, str], int] = {}  # by the hooks before
    drift: dict[tuple[str, str], int] = {}  # of the last hook that was found
    out = []
    for hook in hooks(series):
        if hook.file not in texts:
            path = tree / hook.file
            texts[hook.file] = path.read_text(errors="surrogateescape").splitlines() if path.is_file() else None
        text, key = texts[hook.file], (hook.patch, hook.file)
        found = None if text is None else _locate(text, hook, hook.start + grown.get(key, 0) + drift.get(key, 0))
        if found is None:
            out.append(_missing(hook, text, tree))
            continue
        at, fuzz = found
        offset = drift[key] = at - (hook.start + grown.get(key, 0))
        head, tail = min(fuzz, hook.lead), min(fuzz, hook.tail)
        text[at + head : at + len(hook.old) - tail] = hook.new[head : len(hook.new) - tail]
        grown[key] = grown.get(key, 0) + len(hook.new) - len(hook.old)
        kind = "fuzz" if fuzz else "offset" if offset else "applies"
        out.append(Finding(hook, kind, f"{fuzz}, at line {at + 1}" if fuzz else f"{offset:+d}, at line {at + 1}" if offset else ""))
    return out


def _parse(patch: Path) -> Iterator[Hook]:
    hook: Hook | None = None
    file, left, right = "", 0, 0
    for line in patch.read_text(errors="surrogateescape").splitlines():
        if hook is not None and (left > 0 or right > 0):
            sign, body = line[:1] or " ", line[1:]
            if sign in " -":
                hook.old.append(body)
                left -= 1
            if sign in " +":
                hook.new.append(body)
                right -= 1
            if sign == " ":
                hook.tail += 1
                hook.lead += not hook.lines
            elif sign in "+-":
                hook.tail = 0
                (hook.added if sign == "+" else hook.removed).append(body)
            if left == right == 0:
                yield hook
                hook = None
        elif line.startswith("+++ b/"):
            file = line[6:].split("\t")[0]
        elif match := re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", line):
            left, right = int(match[2] or 1), int(match[3] or 1)
            hook = Hook(patch.name, file, int(match[1]) - 1)


def _locate(text: list[str], hook: Hook, expected: int) -> tuple[int, int] | None:
    """The nearest place with the least fuzz; with fuzz it must be the only one, and more than a brace."""
    for fuzz in range(FUZZ + 1):
        head, tail = min(fuzz, hook.lead), min(fuzz, hook.tail)
        wanted = hook.old[head : len(hook.old) - tail]
        places = [i - head for i in range(len(text) - len(wanted) + 1) if text[i : i + len(wanted)] == wanted] if wanted else []
        if places and (fuzz == 0 or (len(places) == 1 and any(len(line.strip()) >= LEAST_ANCHOR for line in wanted))):
            return min(places, key=lambda i: abs(i - expected)), fuzz
    return None


def _missing(hook: Hook, text: list[str] | None, tree: Path) -> Finding:
    here = [(anchor, [i + 1 for i, line in enumerate(text or []) if line.strip() == anchor.strip()]) for anchor in hook.anchors]
    if here := [(anchor, places) for anchor, places in here if places]:
        anchor, places = min(here, key=lambda x: len(x[1]))  # the one that says most
        return Finding(hook, "moved", f"('{anchor.strip()}' is now at {_lines(places)})")
    for anchor in hook.anchors:
        for name, number in _elsewhere(tree, anchor.strip()):
            return Finding(hook, "moved", f"('{anchor.strip()}' is now at {name}:{number})")
    what = "the file is gone" if text is None else "none of its lines is there" + (f": '{hook.anchors[0].strip()}'" if hook.anchors else "")
    return Finding(hook, "vanished", f"({what})")


def _lines(places: list[int]) -> str:
    return ("line " if len(places) == 1 else "lines ") + ", ".join(map(str, places[:3])) + (" ..." if len(places) > 3 else "")


def _elsewhere(tree: Path, anchor: str) -> Iterator[tuple[str, int]]:
    for folder in ("src", "ggml/src", "tools", "common"):
        for path in sorted((tree / folder).rglob("*")):
            if path.suffix in SOURCES and path.is_file():
                for i, line in enumerate(path.read_text(errors="replace").splitlines()):
                    if line.strip() == anchor:
                        yield path.relative_to(tree).as_posix(), i + 1
