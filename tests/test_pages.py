"""The pages: what they point at is there, and what follows from the programs is up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:\A|\n)\n(?:(?: {4}|\t).*\n?)+")
LINK = re.compile(r"\]\(\s*<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)|(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#+ +(.*?) *#*$", re.MULTILINE)


CODE = ("", ".py", ".cpp", ".h", ".cu", ".cuh", ".m", ".patch")
VARIABLE = re.compile(r"[\"']((?:LLAMA_)?KVCAPSULE(?:_[A-Z]+)*|GGML(?:_[A-Z]+)*_CAPSULE)[\"']")


def files(*patterns: str) -> list[Path]:
    """Those of the project, not what was built or installed into its folder."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def links(text: str) -> list[str]:
    """Targets of the links of a page, not those in its code."""
    prose = re.sub(r"`[^`\n]*`", "", INDENTED.sub("\n", FENCE.sub("", text)))
    return [first or second for first, second in LINK.findall(prose)]


def anchors(text: str) -> set[str]:
    """What a link may have behind #, by GitHub's rule: small letters, no punctuation, - for a space, -1, -2, ... where a heading is repeated."""
    found: dict[str, int] = {}
    out = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        out.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return out


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere: no such file, no such heading, or a place outside of the project."""
    out = []
    for target in links(page.read_text(encoding="utf-8")):
        name, _, fragment = target.partition("#")
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path = (page.parent / name).resolve() if name else page
        if not path.is_relative_to(ROOT) or not path.exists():
            out.append(f"{target}: there is no such file")
        elif fragment and path.suffix == ".md" and fragment not in anchors(path.read_text(encoding="utf-8")):
            out.append(f"{target}: there is no such heading")
    return out


def test_links_lead_somewhere() -> None:
    found = {str(page.relative_to(ROOT)): lines for page in files("*.md") if (lines := broken(page))}
    assert not found


def test_comments_name_pages_that_are_there() -> None:
    sources = [path for path in files("kvcapsule_gguf", "patches", "converters") if path.suffix in CODE]
    named = {(name, str(path.relative_to(ROOT))) for path in sources for name in re.findall(r"docs/[\w/.-]+\.md\b", path.read_text(encoding="utf-8", errors="replace"))}
    assert not {(name, path) for name, path in named if not (ROOT / name).is_file()}


def test_what_counts_as_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_pages.ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# One `two`, [three](x.md)!\n# Twice\n# Twice\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](other.md) [b](other.md#one-two-three) [c](#here) [d](https://example.org/x) [e](other.md#twice-1) <img src=\"other.md\">\n"
        "```\n[in code](nowhere.md)\n```\nand `[so](nowhere.md)`\n\n    [indented](nowhere.md)\n"
    )
    assert broken(page) == []
    page.write_text("[a](gone.md) [b](other.md#no-heading) [c](#here) [d](../outside.md) ![e](gone.png) <img src=\"gone.svg\"> [f](other.md#twice-2)\n")
    assert [line.partition(":")[0] for line in broken(page)] == ["gone.md", "other.md#no-heading", "#here", "../outside.md", "gone.png", "gone.svg", "other.md#twice-2"]


def test_generated_pages_are_up_to_date() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    from pages_steps import made

    for path, text in made(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.relative_to(ROOT)}: run scripts/pages"


def test_every_environment_variable_is_described() -> None:
    text = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    sources = [path for path in files("kvcapsule_gguf", "patches", "scripts", "tests") if path.suffix in CODE]
    read = {name for path in sources for name in VARIABLE.findall(path.read_text(encoding="utf-8", errors="replace"))}
    assert sorted(described) == sorted(read)


def test_the_first_commands_of_the_readme_are_what_the_workflow_runs() -> None:
    block = re.search(r"\n\n((?: {4}.*\n)+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert block
    commands = [line.split("#")[0].strip() for line in block[1].splitlines()]
    assert len(commands) == 2 and all((ROOT / command).is_file() for command in commands)
    assert re.findall(r"run: (scripts/.*)", (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")) == commands
