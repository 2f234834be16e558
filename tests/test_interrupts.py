"""Ctrl-C, and stdout that is closed or full. How soon a program ends is measured by scripts/interrupts: here nothing depends on the clock."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_model import write_folder
from conftest import ROOT, library
from test_image_cache import chat as open_chat
from test_native import require_capsules

from kvcapsule_gguf import native
from kvcapsule_gguf.chat.contents import Contents
from kvcapsule_gguf.runtime import interrupts
from kvcapsule_gguf.runtime.errors import KVCapsuleError
from kvcapsule_gguf.runtime.interrupts import Interrupts

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_capsules()
    native.load(library("patched"))
    return write_folder(tmp_path_factory.mktemp("interrupts"), ("llama", "qwen2vl"))


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


# --- where KeyboardInterrupt would be lost -----------------------------------------------------------------------------------------------------


def test_it_is_raised_in_python_code() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        press()
        while True:
            pass


def test_in_a_callback_of_native_code_it_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    """qsort of the C library calls a function of Python; without Interrupts the exception is printed and dropped."""
    compare_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
    calls = 0

    @compare_type
    def compare(a, b) -> int:
        nonlocal calls
        calls += 1
        if calls == 100:
            press()
        return a[0] - b[0]

    numbers = (ctypes.c_int * 2000)(*range(2000, 0, -1))
    with pytest.raises(KeyboardInterrupt), Interrupts() as current:
        current.session = True  # on a slow machine qsort may take longer than a program has to end
        ctypes.CDLL(None).qsort(numbers, len(numbers), ctypes.sizeof(ctypes.c_int), compare)
        while True:  # the thread may not have come to it yet
            pass
    assert calls > 100
    assert "ignored" not in capfd.readouterr().err


def test_in_a_finalizer_it_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    class Thing:
        def __del__(self) -> None:
            press()
            time.sleep(5)  # ended by KeyboardInterrupt, which Python drops

    with pytest.raises(KeyboardInterrupt), Interrupts() as current:
        current.session = True
        Thing()
        while True:
            pass
    assert "ignored" not in capfd.readouterr().err


def test_while_the_api_is_imported_it_is_not_lost(folder: Path) -> None:
    """Python's import has callbacks of its own, from which it drops the exception: here one is made."""
    code = """
import os, signal, sys, time, weakref

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "kvcapsule_gguf.native":
            thing = set()
            self.dropped = weakref.ref(thing, lambda _: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60)))

sys.meta_path.insert(0, Finder())
try:
    from kvcapsule_gguf import KVCapsuleLlama
except KeyboardInterrupt:
    print("raised")
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), preexec_fn=default_signal, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "raised\n", "")


def test_it_comes_after_what_has_to_be_whole() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Interrupts() as current:
        current.session = True
        with interrupts.deferred():
            press()
            time.sleep(0.3)
            done.append(1)
        while True:
            pass
    assert done == [1]


def test_an_error_because_of_it_is_no_error() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts() as current:
        current._deferred = 1  # as if nothing had come between
        press()
        raise RuntimeError("llama_decode returned 2")


def test_handlers_of_others_stay() -> None:
    threads = threading.active_count()
    handlers = signal.getsignal(signal.SIGINT), sys.unraisablehook, signal.set_wakeup_fd(-1)
    for guest in (False, True):
        with Interrupts(guest):
            pass
        assert (signal.getsignal(signal.SIGINT), sys.unraisablehook, signal.set_wakeup_fd(-1)) == handlers
        assert threading.active_count() == threads
    theirs = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with Interrupts(guest=True):
            press()  # goes to them
    finally:
        signal.signal(signal.SIGINT, theirs)


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex that is all zeros")
def test_native_code_that_does_not_stop_ends_with_its_process() -> None:
    code = """
import ctypes, os, signal, threading
from kvcapsule_gguf.runtime import interrupts
mutex = ctypes.create_string_buffer(64)
with interrupts.Interrupts():
    interrupts.farewell("good bye")
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, preexec_fn=default_signal)
    assert (done.returncode, done.stderr) == (130, "\ngood bye\n")


# --- native code that stops --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stop() -> Iterator[Callable[[bool], None]]:
    """Ctrl-C as native code sees it."""

    def set_it(on: bool) -> None:
        interrupts._stop[0] = bytes([on])

    yield set_it
    set_it(False)


def test_loading_stops(folder: Path, stop: Callable[[bool], None]) -> None:
    llama = native.load().llama
    path = str(folder / "llama" / "tiny.gguf").encode()
    stop(True)
    assert not llama.llama_model_load_from_file(path, interrupts.stoppable(llama.llama_model_default_params()))
    stop(False)
    model = llama.llama_model_load_from_file(path, interrupts.stoppable(llama.llama_model_default_params()))
    assert model
    llama.llama_model_free(model)


def test_a_stopped_picture_and_a_stopped_text_leave_the_conversation_as_it_was(folder: Path, stop: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers as in a conversation in which the stopped questions were never asked."""
    add_image, add_text = Contents.add_image, Contents.add_text

    def stopped(real: Callable) -> Callable:
        def add(self: Contents, *arguments) -> None:
            stop(True)
            try:
                real(self, *arguments)
            except Exception:  # native code stopped, as after Ctrl-C
                raise KeyboardInterrupt from None
            finally:
                stop(False)
            raise AssertionError("it was not stopped")

        return add

    for arch in ("llama", "qwen2vl"):
        with open_chat(folder, arch) as c:
            expected = [c.ask("what?", "a.png").answer, c.ask("and?").answer]
        with open_chat(folder, arch) as c:
            answers = [c.ask("what?", "a.png").answer]
            for name, real in (("add_image", add_image), ("add_text", add_text)):
                with monkeypatch.context() as patch:
                    patch.setattr(Contents, name, lambda self, *arguments, **how: stopped(real)(self, *arguments, *how.values()))
                    with pytest.raises(KeyboardInterrupt):
                        c.ask("never asked", "b.png")
            turn = c.ask("and?")
            assert [*answers, turn.answer] == expected and turn.images_encoded == 0


def test_a_projector_stops_in_the_middle(folder: Path, stop: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked about every node of its graph, and about fewer when it was told to stop."""
    add_image, asked = Contents.add_image, []

    def counted(self: Contents, *arguments) -> None:
        before = interrupts._nodes
        stop(len(asked) == 1)
        try:
            add_image(self, *arguments)
        finally:
            asked.append(interrupts._nodes - before)

    monkeypatch.setattr(Contents, "add_image", counted)
    with open_chat(folder, "llama") as c:
        c.ask("what?", "a.png")
        with pytest.raises(KVCapsuleError):
            c.ask("what?", "b.png")
    whole, stopped = asked
    assert interrupts.NODES <= stopped < whole


def test_ctrl_c_in_an_answer_keeps_what_was_said(folder: Path) -> None:
    def end_it(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    said: list[str] = []
    with open_chat(folder, "llama", "-n", "12") as c:
        c.ask("what?", "a.png")
        turn = c.session.ask("tell me", [], end_it, keep_part=True)
        assert turn.finish_reason == "interrupted" and turn.answer == "".join(said) and len(said) == 3
        messages = list(c.session.messages)
        after = c.ask("and?").answer
    with open_chat(folder, "llama", "-n", "12") as c:
        c.ask("what?", "a.png")
        c.session.messages, c.session.state.text = messages, ""
        assert c.ask("and?").answer == after


# --- programs ----------------------------------------------------------------------------------------------------------------------------------


def default_signal() -> None:
    """A shell without job control starts its background jobs with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "KVCAPSULE_LIB"))}
    return {**kept, "PYTHONPATH": str(ROOT), "KVCAPSULE_LIB": str(library("patched")), "TERM": "dumb"}


def start(name: str, *arguments: object, **how) -> subprocess.Popen:
    code = f"import sys; from kvcapsule_gguf.runtime.start import {name}; sys.exit({name}())"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment(), preexec_fn=default_signal, **how)


DEMO = ROOT / "kvcapsule_gguf" / "demo"
MODEL, MMPROJ, CAPSULE = DEMO / "kvdemo-8M-v1-F16.gguf", DEMO / "mmproj-kvdemo-8M-v1-F16.gguf", DEMO / "kvcapsule-kvdemo-8M-v1.gguf"


@pytest.mark.parametrize("name, arguments", [
    ("chat", (MODEL, "--image", DEMO / "scene-1.jpg", "-p", "What is in the picture?")),
    ("train", (MODEL, "--mmproj", MMPROJ, "--n-images", "96", "-o", "kvcapsule-out.gguf")),
    ("evaluate", (MODEL, "--mmproj", MMPROJ, "--capsule", CAPSULE, "-n", "400")),
    ("bench", ("demo", "--images", "4", "-r", "50")),
])  # fmt: skip
def test_programs_end_at_any_moment(folder: Path, tmp_path: Path, name: str, arguments: tuple) -> None:
    """At three moments, from early to late: while modules are read, while the model is loaded, in the middle of the work."""
    for moment in (0.3, 1.0, 3.0):
        with start(name, *arguments, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            time.sleep(moment)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        done_before = process.returncode == 0 and name == "chat"
        assert process.returncode in (130, -signal.SIGINT) or done_before, said
        assert b"Traceback" not in said and b"ignored" not in said, said


STOPPED = """
import os, signal, sys, time
from kvcapsule_gguf.chat import session
from kvcapsule_gguf.runtime import start

def chain(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

session.chain = chain
sys.exit(getattr(start, sys.argv.pop(1))())
"""


@pytest.mark.parametrize("name, arguments", [
    ("chat", (MODEL, "--capsule", "off", "-p", "Hello")),
    ("bench", ("demo", "--images", "1", "-r", "1", "-s", "f16 FA")),
    ("bench", ("compress", "demo", "-r", "1")),
])  # fmt: skip
def test_programs_end_in_the_moment_at_which_an_answer_begins(folder: Path, tmp_path: Path, name: str, arguments: tuple) -> None:
    """A session goes on there; who only reads pictures must not."""
    command = [sys.executable, "-c", STOPPED, name, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), preexec_fn=default_signal, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert done.returncode == 130 and b"Traceback" not in done.stderr, done.stderr


def test_a_reader_that_has_seen_enough_and_a_full_disk(folder: Path) -> None:
    for name, arguments in (("inspect", (CAPSULE, "--json")), ("chat", (folder / "llama" / "tiny.gguf", "-n", "4", "-p", "hello"))):
        read, write = os.pipe()
        os.close(read)
        with start(name, *arguments, stdout=write, stderr=subprocess.PIPE) as process:
            os.close(write)
            said = process.stderr.read()
        assert (process.wait(), said) == (1, b"")
        with open("/dev/full", "wb") as full, start(name, *arguments, stdout=full, stderr=subprocess.PIPE) as process:
            said = process.stderr.read().decode()
        assert process.wait() == 1 and said.splitlines() == [f"kvcapsule-{name}: error: stdout: No space left on device"]
        code = f"import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m', 'kvcapsule_gguf.{name}.cli', *sys.argv[1:]])"
        closed = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment(), capture_output=True, text=True, timeout=60)
        assert closed.returncode == 1 and closed.stderr.splitlines() == [f"kvcapsule-{name}: error: stdout: Bad file descriptor"]


# --- a session at a terminal -------------------------------------------------------------------------------------------------------------------


class Terminal:
    def __init__(self, *arguments: object) -> None:
        pty = pytest.importorskip("pty")
        self.fd, inner = pty.openpty()
        self.process = start("chat", *arguments, stdin=inner, stdout=inner, stderr=inner, start_new_session=True)
        os.close(inner)
        self.said = b""

    def write(self, text: str) -> None:
        self.said = b""
        os.write(self.fd, text.encode())

    def until(self, words: bytes, anywhere: bool = False) -> str:
        deadline = time.monotonic() + 60
        while words not in self.said if anywhere else not self.said.endswith(words):
            assert select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))[0], self.said
            try:
                self.said += os.read(self.fd, 65536)
            except OSError:  # the other side is closed
                break
        return self.said.decode()

    def press(self) -> None:
        self.said = b""
        self.process.send_signal(signal.SIGINT)

    def ended(self) -> int:
        self.until(b"no such end")
        os.close(self.fd)
        return self.process.wait(60)


def test_ctrl_c_in_a_session(folder: Path) -> None:
    terminal = Terminal(folder / "llama" / "tiny.gguf", "-c", "4096", "--capsule", "off", "-t", "1", "--temp", "0")
    assert "no capsule" in terminal.until(b"> ")
    terminal.write(f"/image {folder / 'a.png'}\n")
    terminal.until(b"> ")
    terminal.write("talk\n")
    terminal.until(b" s\r\n", anywhere=True)  # the line about the picture
    assert "a.png: being read |" in terminal.said.decode() and "a.png: 16 tokens, 0.02 MiB, " in terminal.said.decode()
    terminal.press()  # while it talks, or a moment before
    assert "Traceback" not in terminal.until(b"> ")
    terminal.write("half a line")
    terminal.until(b"half a line")
    terminal.press()
    assert "Ctrl-C again" not in terminal.until(b"> ")
    terminal.press()
    assert "Ctrl-C again" in terminal.until(b"> ")
    terminal.write("/stats\n")
    assert "context:" in terminal.until(b"> ")
    terminal.press()
    terminal.until(b"> ")
    terminal.press()
    assert terminal.ended() == 130
