"""The session of kvcapsule-chat: its commands in a pipe, and what a terminal adds."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from chat_model import TOKENS, write_folder
from test_chat import Run, chat  # noqa: F401  (a fixture)
from test_interrupts import Terminal
from test_native import require_capsules

from kvcapsule_gguf.chat.lines import Lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_capsules()
    return write_folder(tmp_path_factory.mktemp("repl"), ("llama", "qwen2vl"))


def session(chat: Run, folder: Path, lines: str, *arguments: object, arch: str = "llama") -> tuple[list[dict], str, int]:
    """The objects of --json, stderr and the exit status."""
    result = chat(folder / arch / "tiny.gguf", "-n", "6", "--capsule", "off", "--json", *arguments, stdin=lines)
    assert "Traceback" not in result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()], result.stderr, result.returncode


@pytest.mark.parametrize("arch", ["llama", "qwen2vl"])
def test_regen_asks_the_last_question_again(chat: Run, folder: Path, arch: str) -> None:
    """Greedy, so the answer is the same; nothing but the last token of the prompt is evaluated for it, and the conversation goes on as if it had been asked once."""
    a = f"/image {folder / 'a.png'}\nwhat?\n"
    (first, again, after), said, status = session(chat, folder, f"{a}/regen\nand?\n", arch=arch)
    (expected, expected_after), _, _ = session(chat, folder, f"{a}and?\n", arch=arch)
    assert status == 0, said
    assert first["answer"] == again["answer"] == expected["answer"] and after["answer"] == expected_after["answer"]
    assert (again["images_encoded"], again["tokens_evaluated"]) == (0, 1) and len(after["images"]) == 1


def test_regen_without_a_question(chat: Run, folder: Path) -> None:
    turns, said, status = session(chat, folder, "/regen\n/clear\n/regen\nwhat?\n")
    assert status == 1 and said.count("error: there is no question yet") == 2 and len(turns) == 1


def test_pictures_are_listed_and_left_out(chat: Run, folder: Path) -> None:
    a, b, c = (folder / name for name in ("a.png", "b.png", "c.png"))
    lines = f"/images\n/drop\n/image {a}\nwhat?\n/image {b}\n/image {c}\n/images\n/drop 1\n/drop 2\n/drop x\n/images\nthis?\n/images\n"
    turns, said, status = session(chat, folder, lines)
    assert status == 1 and [turn["vision_tokens"] for turn in turns] == [TOKENS] * 2
    assert [image["name"] for image in turns[1]["images"]] == [str(a), str(c)]
    listed = [line for line in said.splitlines() if line[:2] in ("1:", "2:", "3:", "no")]
    pending = ", goes with the next question"
    first = f"1: {a}, 112 x 112"
    assert listed == ["no pictures", first, f"2: {b}, 112 x 112{pending}", f"3: {c}, 112 x 112{pending}", first, f"2: {c}, 112 x 112{pending}", first, f"2: {c}, 112 x 112"]
    assert f"{b}: left out" in said and said.count("error: /drop takes a picture out of the next question") == 2 and "error: no picture goes with the next question" in said


def test_a_line_that_ends_with_a_backslash_goes_on(chat: Run, folder: Path) -> None:
    (both,), _, _ = session(chat, folder, "one\\\ntwo\\\n\n")
    (inline,), _, _ = session(chat, folder, "", "-p", "one\ntwo")
    (single,), _, _ = session(chat, folder, "", "-p", "onetwo")
    assert both["answer"] == inline["answer"] != single["answer"]
    (end,), _, _ = session(chat, folder, "one\\")
    assert end["answer"] == session(chat, folder, "", "-p", "one")[0][0]["answer"]


def test_completions(tmp_path: Path) -> None:
    for name in ("photo one.jpg", "photo[2].jpg", "other.png"):
        (tmp_path / name).touch()
    (tmp_path / "photos").mkdir()
    complete = Lines(["/image", "/images", "/undo"])._completions
    assert complete("/im") == ["/image", "/images"] and complete("/u") == ["/undo"] and complete("im") == complete("/x") == []
    start = f"/image {tmp_path}/"
    assert complete(start + "ph") == [f"{start}photo one.jpg", f"{start}photo[2].jpg", f"{start}photos/"]
    assert complete(f"{start}photo[") == [f"{start}photo[2].jpg"] and complete(f"/undo {tmp_path}/") == []


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals of POSIX")
def test_a_terminal_has_a_history_and_completion(folder: Path) -> None:
    """What was typed in one session is found in the next one, by the arrow up."""
    pytest.importorskip("readline")
    arguments = folder / "llama" / "tiny.gguf", "-n", "4", "--capsule", "off", "-t", "1", "--temp", "0"
    terminal = Terminal(*arguments)
    terminal.until(b"> ")
    terminal.write("first of all\n")
    terminal.until(b"> ")
    terminal.write("/exit\n")
    assert terminal.ended() == 0
    history = Path(os.environ["XDG_STATE_HOME"]) / "kvcapsule" / "history"
    assert "first of all" in history.read_text().splitlines() and stat.S_IMODE(history.stat().st_mode) == 0o600

    terminal = Terminal(*arguments)
    terminal.until(b"> ")
    terminal.write("\x1b[A\x1b[A")
    terminal.until(b"first of all")
    terminal.write("\n")
    terminal.until(b"> ")
    terminal.write("/und\t\n")
    assert "taken back: first of all" in terminal.until(b"> ")
    terminal.write(f"/image {folder}/a.p\t\n")
    assert "a.png: 112 x 112, goes with the next question" in terminal.until(b"> ")
    terminal.write("two \\\n")
    terminal.until(b"| ")
    terminal.write("lines\n")
    terminal.until(b"> ")
    terminal.write("/undo\n")
    assert "taken back: two \r\nlines" in terminal.until(b"> ")
    terminal.write("/exit\n")
    assert terminal.ended() == 0
