"""scripts/check_patches: counts hooks and lines, and says of each hook whether another llama.cpp still has its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from setup_steps import hooks, patching, source  # noqa: E402

CODE = "".join(f"    line_number({i}); // of many\n" for i in range(60))
OTHER = "int unrelated_function() {\n    return 1;\n}\n"
PATCH = """From: a test
---
diff --git a/src/a.cpp b/src/a.cpp
--- a/src/a.cpp
+++ b/src/a.cpp
@@ -9,6 +9,7 @@
     line_number(8); // of many
     line_number(9); // of many
     line_number(10); // of many
+    first_hook(); // [TAG_CAPSULE]
     line_number(11); // of many
     line_number(12); // of many
     line_number(13); // of many
@@ -39,7 +40,7 @@
     line_number(38); // of many
     line_number(39); // of many
     line_number(40); // of many
-    line_number(41); // of many
+    second_hook(); // [TAG_CAPSULE]
     line_number(42); // of many
     line_number(43); // of many
     line_number(44); // of many
"""


@pytest.fixture
def series(tmp_path) -> Path:
    folder = tmp_path / "patches"
    (folder / "files" / "src").mkdir(parents=True)
    (folder / "files" / "src" / "new.cpp").write_text("int x;\n")
    (folder / "0001-two-hooks.patch").write_text(PATCH)
    return folder


@pytest.fixture
def tree(tmp_path) -> Path:
    for name, text in {"include/llama.h": "", "src/a.cpp": CODE, "src/b.cpp": OTHER}.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)
    return tmp_path / "tree"


def check(series: Path, tree: Path) -> tuple[int, list[str]]:
    """Exit status and lines; the tree must not change."""
    before = {p: p.read_bytes() for p in tree.rglob("*") if p.is_file()}
    p = subprocess.run([sys.executable, ROOT / "scripts" / "check_patches", "--patches", series, "--against", tree], capture_output=True, text=True)
    assert {p: p.read_bytes() for p in tree.rglob("*") if p.is_file()} == before
    return p.returncode, p.stdout.splitlines() + p.stderr.splitlines()


def replaced(tree: Path, old: str, new: str) -> None:
    text = (tree / "src" / "a.cpp").read_text()
    assert old in text
    (tree / "src" / "a.cpp").write_text(text.replace(old, new))


def test_applies(series, tree):
    rc, lines = check(series, tree)
    assert rc == 0
    assert lines[0] == "0001-two-hooks.patch: 2 hooks, +2 -1 in src/a.cpp"
    assert lines[1] == "1 patches, 2 hooks, 3 changed lines (at most 120); 1 new files"
    assert lines[2:4] == ["0001 src/a.cpp: applies: first_hook();", "0001 src/a.cpp: applies: second_hook();"]


def test_offset(series, tree):
    replaced(tree, "    line_number(20); // of many\n", "    line_number(20); // of many\n" + "// more\n" * 5)
    rc, lines = check(series, tree)
    assert rc == 0 and lines[2] == "0001 src/a.cpp: applies: first_hook();" and lines[3] == "0001 src/a.cpp: offset +5, at line 45: second_hook();"


def test_fuzz(series, tree):
    replaced(tree, "line_number(8);", "line_number(800);")
    rc, lines = check(series, tree)
    assert rc == 0 and lines[2] == "0001 src/a.cpp: fuzz 1, at line 9: first_hook();" and "applies: second_hook" in lines[3]


def test_moved(series, tree):
    """The line that the hook replaces is among others."""
    replaced(tree, "    line_number(41); // of many\n", "")
    replaced(tree, "line_number(5); // of many\n", "line_number(5); // of many\n        line_number(41); // of many\n")
    rc, lines = check(series, tree)
    assert rc == 1 and lines[3] == "0001 src/a.cpp: moved ('line_number(41); // of many' is now at line 7): second_hook();"


def test_moved_to_another_file(series, tree):
    (tree / "src" / "b.cpp").write_text(OTHER + CODE)
    (tree / "src" / "a.cpp").write_text(OTHER)
    rc, lines = check(series, tree)
    assert rc == 1 and "moved ('line_number(10); // of many' is now at src/b.cpp:14): first_hook();" in lines[2]


def test_vanished(series, tree):
    (tree / "src" / "a.cpp").unlink()
    rc, lines = check(series, tree)
    assert rc == 1 and lines[2] == "0001 src/a.cpp: vanished (the file is gone): first_hook();"
    (tree / "src" / "a.cpp").write_text(OTHER)
    assert "vanished (none of its lines is there" in check(series, tree)[1][2]


def test_too_many_lines(series, tree):
    body = "".join(f"+    hook({i}); // [TAG_CAPSULE]\n" for i in range(121))
    (series / "0001-two-hooks.patch").write_text(f"--- a/src/b.cpp\n+++ b/src/b.cpp\n@@ -1,3 +1,124 @@\n int unrelated_function() {{\n{body}     return 1;\n }}\n")
    rc, lines = check(series, tree)
    assert rc == 1 and any("121 changed lines in llama.cpp's files, more than 120" in line for line in lines)


def test_not_a_tree(series, tmp_path):
    rc, lines = check(series, tmp_path / "patches")
    assert rc == 1 and "is not a llama.cpp source tree" in lines[-1]


def test_our_series():
    """Under the limit."""
    found = hooks.hooks(patching.Series.read(ROOT / "patches"))
    assert sum(hook.lines for hook in found) <= 120 and len(found) > 20


def test_our_series_in_a_changed_llama_cpp(tmp_path):
    """The pinned tree with its largest hooked file moved by a few lines: offsets only, and all hooks at their place."""
    pristine = Path(os.environ.get("KVCAPSULE_TEST_PRISTINE") or source.PRISTINE)
    if not (pristine / "src" / "llama-kv-cache.cpp").is_file():
        pytest.skip("no pristine llama.cpp: run scripts/setup, or set KVCAPSULE_TEST_PRISTINE")
    series = patching.Series.read(ROOT / "patches")
    assert {f.kind for f in hooks.check(series, pristine)} == {"applies"}
    for name in {hook.file for hook in hooks.hooks(series)}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((pristine / name).read_bytes())
    kv = tmp_path / "src" / "llama-kv-cache.cpp"
    kv.write_text("// seven more lines\n" * 7 + kv.read_text())
    found = list(hooks.check(series, tmp_path))
    assert {f.kind for f in found if f.hook.file == "src/llama-kv-cache.cpp"} == {"offset"}
    assert {f.kind for f in found if f.hook.file != "src/llama-kv-cache.cpp"} == {"applies"}
    (tmp_path / "src" / "llama-graph.cpp").write_text("// rewritten\n")
    assert not any(f.ok for f in hooks.check(series, tmp_path) if f.hook.file == "src/llama-graph.cpp")
