"""How programs end: whose fault an exception is, what the exit status says, which file is full."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from kvcapsule_gguf.runtime import program
from kvcapsule_gguf.runtime.errors import CapsuleError, InputError, KVCapsuleError
from kvcapsule_gguf.runtime.pictures import PictureError


def ends(error: BaseException | None, status: int | None = None) -> int:
    def body() -> int | None:
        if error is not None:
            raise error
        return status

    return program.run("p", body)


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(None) == 0 and ends(None, 3) == 3
    assert ends(KeyboardInterrupt()) == 130 and capsys.readouterr().err == "\n"
    with pytest.raises(SystemExit) as stopped:
        program.Parser(prog="p").parse_args(["--no-such"])
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("kind", [KVCapsuleError, InputError, CapsuleError, PictureError])
def test_an_error_of_ours_is_a_line_for_the_user(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(kind("two\nlines")) == 1 and capsys.readouterr().err == "p: error: two lines\n"


@pytest.mark.parametrize("error", [ValueError("two\nlines"), KeyError("x"), RuntimeError(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no")])
def test_any_other_exception_is_a_fault_of_the_program(error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(program.TRACEBACK, raising=False)
    assert ends(error) == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"p: fault of the program, please report it: {type(error).__name__}: ") and "KVCAPSULE_TRACEBACK=1" in line
    monkeypatch.setenv(program.TRACEBACK, "1")
    assert ends(error) == 70
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and f'File "{__file__}"' in said and said.splitlines()[-1] == line


def test_what_the_system_refuses_is_no_fault_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    for error, line in (
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.gguf"), "p: error: x.gguf: No such file or directory\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "p: error: No space left on device\n"),  # of some file, and not of stdout, which is fine
        (MemoryError(), "p: error: there is not enough memory\n"),
        (BrokenPipeError(), ""),
    ):
        assert ends(error) == 1 and capsys.readouterr().err == line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full")
@pytest.mark.parametrize(
    "body, where",
    [
        ("print('x')", "stdout: "), ("print('x', flush=True)", "stdout: "), ("print('x' * 9999)", "stdout: "),
        ("[print('x' * 99) for _ in range(9999)]", "stdout: "), ("sys.stdout.buffer.write(b'x' * 99999)", "stdout: "),
        ("Path('/dev/full').write_text('x')", ""),
    ],
)  # fmt: skip
def test_a_full_stdout_is_named(body: str, where: str) -> None:
    """Whether it is noticed in the middle or at the end, and when nothing of it is left in a buffer. Other files are not taken for it."""
    code = f"import sys\nfrom pathlib import Path\nfrom kvcapsule_gguf.runtime import program\nsys.exit(program.run('p', lambda: ({body}, None)[1]))"
    with open("/dev/full" if where else os.devnull, "w") as stdout:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, f"p: error: {where}No space left on device\n")


def test_a_line_for_a_closed_stderr_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed, monkeypatch.context() as context:
        context.setattr("sys.stderr", closed)
        assert ends(InputError("x")) == 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), closed.fileno())  # what is buffered is written at the end
