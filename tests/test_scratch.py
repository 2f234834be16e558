"""Temporary folders and their ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from kvcapsule_gguf.runtime.scratch import Scratch

HOLD = "import sys, time\nfrom kvcapsule_gguf.runtime.scratch import Scratch\nscratch = Scratch()\n(scratch.path / 'data').write_bytes(b'x')\nprint(scratch.path, flush=True)\ntime.sleep(300)"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_it_goes_when_it_is_closed(folder: Path) -> None:
    with Scratch() as path:
        (path / "sub").mkdir()
        assert path.parent == folder and path.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
@pytest.mark.parametrize("number", ["SIGKILL", "SIGHUP", "SIGTERM"])
def test_that_of_a_killed_process_goes_when_the_next_is_made(folder: Path, number: str) -> None:
    """That of a living process, and a folder of somebody else, stay."""
    other = folder / "kvcapsule-of-a-user"
    other.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([sys.executable, "-c", HOLD], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, living = (Path(process.stdout.readline().strip()) for process in processes)
        processes[0].send_signal(getattr(signal, number))
        processes[0].wait()
        assert (killed / "data").exists()
        with Scratch() as path:
            assert set(folder.iterdir()) == {other, living, path}
            assert (living / "data").exists()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
