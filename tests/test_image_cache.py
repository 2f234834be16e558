"""A picture is paid for once: over turns, changed questions, restarts. In one process, on tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chat_model import TOKENS, write_folder, write_mmproj
from conftest import ROOT, library
from make_capsule import random_capsule
from test_native import require_capsules

from kvcapsule_gguf import native
from kvcapsule_gguf.chat import args, saved
from kvcapsule_gguf.chat.engine import Engine
from kvcapsule_gguf.chat.session import Session, Turn
from kvcapsule_gguf.reuse import container
from kvcapsule_gguf.runtime.errors import KVCapsuleError
from kvcapsule_gguf.runtime.pictures import load as load_picture

ARCHS = ("llama", "qwen2vl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_capsules()
    native.load(library("patched"))
    root = write_folder(tmp_path_factory.mktemp("cache"), ARCHS)
    for arch in ARCHS:
        random_capsule(root / arch / "tiny.gguf", root / arch / "other.gguf", tiers=(4, 8), seed=2)
    write_mmproj(root / "llama" / "other-mmproj.gguf", seed=9)
    return root


class Chat:
    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.folder = session, folder

    def ask(self, question: str, *pictures: str) -> Turn:
        return self.session.ask(question, [load_picture(str(self.folder / name)) for name in pictures], lambda text: None)

    def vision(self) -> int:
        return sum(image.tokens for image in self.session.state.images)


@contextmanager
def chat(folder: Path, arch: str = "llama", *arguments: str | Path) -> Iterator[Chat]:
    told: list[str] = []
    options = args.parse([str(folder / arch / "tiny.gguf"), "-n", "6", "--temp", "0", "-t", "1", "-c", "1024", *map(str, arguments)], {})
    with Engine(options, told.append) as engine:
        yield Chat(Session(engine, options), folder)


def counts(turn: Turn) -> tuple[int, int]:
    return turn.images_encoded, turn.images_loaded


# --- turns -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("capsule", ["auto", "off"])
def test_ten_questions_about_three_pictures_encode_three(folder: Path, arch: str, capsule: str) -> None:
    with chat(folder, arch, "--capsule", capsule) as c:
        turns = [c.ask("what?", name) for name in ("a.png", "b.png", "c.png")] + [c.ask(f"and {i}?") for i in range(7)]
    assert sum(turn.images_encoded for turn in turns) == 3
    assert all(turn.vision_tokens == 0 and turn.tokens_evaluated < 40 for turn in turns[3:])
    assert turns[-1].tokens_reused == sum(turn.tokens_evaluated + turn.generated_tokens for turn in turns[:-1])


@pytest.mark.parametrize("arch", ARCHS)
def test_a_changed_question_keeps_what_is_before_it(folder: Path, arch: str) -> None:
    with chat(folder, arch) as c:
        c.ask("what?", "a.png")
        first = c.ask("this?", "b.png")
        question, pictures = c.session.undo() or ("", [])
        assert question == "this?" and [Path(picture.name).name for picture in pictures] == ["b.png"]
        again = c.ask("this?", "b.png")
        # the second picture is where it was, and only the question after it is read
        assert counts(again) == (0, 0) and again.vision_tokens == 0 and again.answer == first.answer
        c.session.undo()
        other = c.ask("that?", "c.png")
        assert counts(other) == (1, 0) and other.tokens_reused > TOKENS
        assert c.vision() == 2 * TOKENS and [image.name[-5:] for image in c.session.state.images] == ["a.png", "c.png"]
        c.session.undo(), c.session.undo()
        assert c.session.undo() is None and c.session.pictures == []
        fresh = c.ask("what?", "b.png")
    with chat(folder, arch) as c:
        assert c.ask("what?", "b.png").answer == fresh.answer


def test_a_change_of_an_earlier_message(folder: Path) -> None:
    with chat(folder) as c:
        for question, name in (("one?", "a.png"), ("two?", "b.png"), ("three?", "c.png")):
            c.ask(question, name)
        c.session.messages[2]["content"] += " (really)"
        c.session.state.text = ""
        turn = c.ask("four?")
        # the first two pictures stand before the change
        assert counts(turn) == (1, 0)


# --- restarts ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("capsule", ["auto", "off"])
def test_the_next_start_neither_encodes_nor_prefills(folder: Path, tmp_path: Path, arch: str, capsule: str) -> None:
    arguments = ("--capsule", capsule, "--image-cache", tmp_path / "cache")
    with chat(folder, arch, *arguments) as c:
        first = [c.ask("what?", "a.png", "b.png"), c.ask("and?")]
        slots = [image.slots for image in c.session.state.images]
    with chat(folder, arch, *arguments) as c:
        second = [c.ask("what?", "a.png", "b.png"), c.ask("and?")]
        assert [image.slots for image in c.session.state.images] == slots
        if capsule == "auto":
            assert native.stats(c.session.engine.ctx).n_cold == 2 * TOKENS
    with chat(folder, arch, "--capsule", capsule) as c:
        without = [c.ask("what?", "a.png", "b.png"), c.ask("and?")]
    assert [counts(turn) for turn in first + second] == [(2, 0), (0, 0), (0, 2), (0, 0)]
    assert second[0].vision_tokens == 0 and second[0].tokens_evaluated == first[0].tokens_evaluated - second[0].tokens_reused
    assert [turn.answer for turn in first] == [turn.answer for turn in second] == [turn.answer for turn in without]


def test_another_question_and_a_longer_conversation_use_the_same_picture(folder: Path, tmp_path: Path) -> None:
    arguments = ("--image-cache", tmp_path / "cache")
    with chat(folder, "llama", *arguments) as c:
        c.ask("what?", "a.png")
        c.ask("this?", "b.png")
    with chat(folder, "llama", *arguments) as c:
        assert counts(c.ask("something else?", "a.png")) == (0, 1)
        # another question before it: its cache would be another one
        assert counts(c.ask("this?", "b.png")) == (1, 0)


@pytest.mark.parametrize(
    "changed",
    [("--capsule", "off"), ("--capsule", "other.gguf"), ("--mmproj", "other-mmproj.gguf"), ("--image-max-tokens", "8"), ("-sys", "be kind"), ("-ctk", "q8_0", "-fa", "on")],
)
def test_anything_else_is_a_miss(folder: Path, tmp_path: Path, changed: tuple[str, ...]) -> None:
    changed = tuple(str(folder / "llama" / part) if part.endswith(".gguf") else part for part in changed)
    with chat(folder, "llama", "--image-cache", tmp_path / "cache") as c:
        c.ask("what?", "a.png")
    with chat(folder, "llama", "--image-cache", tmp_path / "cache", *changed) as c:
        assert counts(c.ask("what?", "a.png")) == (1, 0)
    with chat(folder, "llama", "--image-cache", tmp_path / "cache") as c:
        assert counts(c.ask("what?", "b.png")) == (1, 0)
        c.session.clear()
        assert counts(c.ask("what?", "a.png")) == (0, 1)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def nonsense_inside(path: Path) -> None:
    """A checksum that fits, around a state that the library must refuse."""
    header, (blob,) = container.read(path)
    container.write(path, header, [bytes(64) + bytes(blob[64:])])


def cut_inside(path: Path) -> None:
    header, (blob,) = container.read(path)
    container.write(path, header, [blob[: len(blob) // 2]])


def renamed(path: Path) -> None:
    header, (blob,) = container.read(path)
    container.write(path, {**header, "key": "0" * 64}, [blob])


@pytest.mark.parametrize("damage", [truncate, flip, nonsense_inside, cut_inside, renamed])
@pytest.mark.parametrize("in_use", [False, True])
def test_a_damaged_entry_is_a_miss(folder: Path, tmp_path: Path, damage: Callable[[Path], None], in_use: bool) -> None:
    """in_use: there is a conversation in the cache already, which the state would replace."""
    arguments = ("--image-cache", tmp_path / "cache")
    with chat(folder, "llama", *arguments) as c:
        if in_use:
            c.ask("hello")
        expected = c.ask("what?", "a.png")
    (entry,) = (tmp_path / "cache").iterdir()
    damage(entry)
    with chat(folder, "llama", *arguments) as c:
        if in_use:
            c.ask("hello")
        turn = c.ask("what?", "a.png")
        assert counts(turn) == (1, 0) and turn.answer == expected.answer
        assert c.vision() == TOKENS


def test_a_folder_that_cannot_be_written_costs_a_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(KVCapsuleError, match="--image-cache"), chat(folder, "llama", "--image-cache", folder / "a.png"):
        pass
    with chat(folder, "llama", "--image-cache", tmp_path) as c:
        monkeypatch.setattr(container, "write", full)
        assert counts(c.ask("what?", "a.png")) == (1, 0)
        assert counts(c.ask("this?", "b.png")) == (1, 0)


# --- /save and /load ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_a_conversation_goes_on_after_a_restart(folder: Path, tmp_path: Path, arch: str) -> None:
    path = tmp_path / "talk"
    with chat(folder, arch) as c:
        c.ask("what?", "a.png")
        saved.save(c.session, path)
        expected = [c.ask("and?"), c.ask("this?", "b.png")]
    with chat(folder, arch) as c:
        c.ask("something else", "c.png")
        assert saved.load(c.session, path) == "1 question and 1 picture, ready"
        turns = [c.ask("and?"), c.ask("this?", "b.png")]
        assert c.vision() == 2 * TOKENS
        # the picture came along, so an earlier point can be gone back to
        c.session.undo(), c.session.undo()
        assert counts(c.ask("and?")) == (0, 0)
    assert [turn.answer for turn in turns] == [turn.answer for turn in expected]
    assert [counts(turn) for turn in turns] == [(0, 0), (1, 0)]
    assert turns[0].tokens_evaluated == expected[0].tokens_evaluated


def test_a_conversation_of_other_settings_is_read_again(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    with chat(folder) as c:
        c.ask("what?", "a.png")
        saved.save(c.session, path)
    with chat(folder, "llama", "--capsule", "off") as c:
        assert "read again" in saved.load(c.session, path)
        assert counts(c.ask("and?")) == (1, 0)


def test_what_was_taken_back_is_still_marked_after_a_restart(folder: Path, tmp_path: Path) -> None:
    from kvcapsule_gguf.chat import stats

    def table(c: Chat) -> str:
        return stats.table(c.session.engine, c.session.state.images, c.session.state.n_cells, c.session.taken_back)

    with chat(folder) as c:
        c.ask("what?", "a.png"), c.ask("this?", "b.png")
        assert "taken back" not in table(c)
        c.session.undo()
        saved.save(c.session, tmp_path / "talk")
        expected = table(c)
        assert expected.count("b.png (taken back)") == 1
    with chat(folder) as c:
        assert saved.load(c.session, tmp_path / "talk") == "1 question and 1 picture, ready"
        assert table(c) == expected
        c.ask("and?")
        assert "taken back" not in table(c)


def test_a_conversation_of_another_model_is_read_again_with_a_warning(folder: Path, tmp_path: Path) -> None:
    with chat(folder) as c:
        c.ask("what?", "a.png")
        saved.save(c.session, tmp_path / "talk")
    with chat(folder, "qwen2vl") as c:
        said = saved.load(c.session, tmp_path / "talk")
        assert said.startswith("warning: 1 question and 1 picture; of another model (tiny.gguf)") and said.endswith("read again with the next question")
        assert counts(c.ask("and?")) == (1, 0)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_file_is_refused_and_the_conversation_stays(folder: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "talk"
    with chat(folder) as c:
        c.ask("what?", "a.png")
        saved.save(c.session, path)
        damage(path)
        with pytest.raises(KVCapsuleError, match="damaged"):
            saved.load(c.session, path)
        with pytest.raises(KVCapsuleError, match="No such file"):
            saved.load(c.session, tmp_path / "no")
        with pytest.raises(KVCapsuleError, match="not a saved state|cut off"):
            saved.load(c.session, folder / "a.png")
        turn = c.ask("and?")
        assert counts(turn) == (0, 0) and c.vision() == TOKENS


def test_a_file_of_somebody_else_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    path, asked = tmp_path / "notes.txt", []

    def answer(yes: bool) -> Callable[[str], bool]:
        return lambda question: asked.append(question) or yes  # type: ignore[func-returns-value]

    path.write_text("mine")
    with chat(folder) as c:
        with pytest.raises(KVCapsuleError, match="no conversation yet"):
            saved.save(c.session, tmp_path / "empty")
        assert not (tmp_path / "empty").exists()
        c.ask("what?", "a.png")
        with pytest.raises(KVCapsuleError, match="notes.txt exists .* choose another name"):
            saved.save(c.session, path)
        assert saved.save(c.session, path, answer(False)) == "not saved" and path.read_text() == "mine"
        with pytest.raises(KVCapsuleError, match="is not a file"):
            saved.save(c.session, tmp_path, answer(True))
        saved.save(c.session, path, answer(True))
        assert container.kind(path) == saved.KIND and len(asked) == 2
        # one of our own is replaced, and a link to it stays a link
        (tmp_path / "link").symlink_to(path)
        c.ask("and?")
        saved.save(c.session, tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and saved.load(c.session, path).startswith("2 questions")
        # pictures of the image cache are containers, but no conversations
        container.write(tmp_path / "picture", {"kind": "prefix"}, [])
        with pytest.raises(KVCapsuleError, match="choose another name"):
            saved.save(c.session, tmp_path / "picture")


@pytest.mark.parametrize("change", [
    {"messages": 5}, {"messages": [["user", "x"]]}, {"messages": [{"role": "user"}]}, {"marker": ""}, {"marker": 7}, {"pictures": ["a", "b"]}, {"pictures": 3}, {"items": [[1]]},
    {"items": [["x", 1 << 40, 1]]}, {"items": "abc"}, {"images": [{}]}, {"images": 9}, {"images": [{"name": 3}]}, {"images": None}, {"pos_max": "x"}, {"pos_max": None}, {"pos_max": 1 << 70},
    {"binding": 5}, {"text": None}, {"text": 5}, {"model": None}, {"model": 5}, {"model": ["x"]}, {"undone": "yes"},
])  # fmt: skip
def test_a_crafted_conversation_is_one_line_or_read_again(folder: Path, tmp_path: Path, change: dict) -> None:
    """Its checksum is right. The conversation before it stays where it is refused."""
    path = tmp_path / "talk"
    with chat(folder) as c:
        c.ask("what?", "a.png")
        saved.save(c.session, path)
        header, blobs = container.read(path)
        container.write(path, {**header, **change}, blobs)
        try:
            saved.load(c.session, path)
        except KVCapsuleError as error:
            assert len(str(error).splitlines()) == 1
            turn = c.ask("and?")
            assert counts(turn) == (0, 0) and c.vision() == TOKENS
        else:
            c.ask("and?")
            assert c.vision() == TOKENS


# --- what else can lie in a folder -------------------------------------------------------------------------------------------------------------


def test_a_folder_for_reading_only_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--image-cache", tmp_path / "cache")
    with chat(folder, "llama", *arguments) as c:
        c.ask("what?", "a.png")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for module, name in ((os, "utime"), (os, "replace"), (Path, "unlink")):  # root may do all of it, whatever the folder's mode is
        monkeypatch.setattr(module, name, refuse)
    with chat(folder, "llama", *arguments) as c:
        assert counts(c.ask("what?", "a.png")) == (0, 1)
        assert counts(c.ask("this?", "b.png")) == (1, 0)


def test_a_pipe_and_a_large_empty_file_are_misses(folder: Path, tmp_path: Path) -> None:
    arguments = ("--image-cache", tmp_path / "cache", "--image-cache-mib", 1)
    for lie in ("pipe", "sparse", "header"):
        with chat(folder, "llama", *arguments) as c:
            c.ask("what?", "a.png")
        (entry,) = (tmp_path / "cache").iterdir()
        head = entry.read_bytes()[:64]
        entry.unlink()
        if lie == "pipe":
            os.mkfifo(entry)
        else:
            with entry.open("wb") as file:
                file.write(head if lie == "header" else b"")
                file.truncate(3 << 30)
        tracemalloc.start()
        with chat(folder, "llama", *arguments) as c:
            assert counts(c.ask("what?", "a.png")) == (1, 0)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
        tracemalloc.stop()


def test_several_writers_keep_the_limit(tmp_path: Path) -> None:
    """Eight processes write at once; whenever one of them has finished, all files together are within the limit."""
    code = """
import sys
from pathlib import Path
from kvcapsule_gguf.reuse.store import Store
store = Store(Path(sys.argv[1]), 300_000)
for i in range(30):
    store.put(f"{int(sys.argv[2]) * 100 + i:064x}", {}, [bytes(40_000)])
    assert store.n_bytes() <= 300_000, store.n_bytes()
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)], cwd=ROOT, stderr=subprocess.PIPE) for n in range(8)]
    for writer in writers:
        _, said = writer.communicate(timeout=120)
        assert writer.returncode == 0, said.decode()
    assert 0 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 300_000
