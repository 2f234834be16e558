"""kvcapsule-server and the process behind it, with a stand-in for llama-server: starts, ends, what is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from chat_model import write_model
from conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Unix sockets")
# it answers /health once, does `then` and ends; each start leaves a line with its time
STAND_IN = """#!{python}
import os, signal, socket, sys, time
with open({log!r}, "a") as log:
    print(time.monotonic(), file=log)
n = len(open({log!r}).readlines())
for _ in range({chatter}):
    print("x" * 99, flush=True)
{first}
inner = socket.socket(socket.AF_UNIX)
inner.bind(sys.argv[sys.argv.index("--host") + 1])
inner.listen()
client, _ = inner.accept()
client.recv(999)
client.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\n")
time.sleep(0.2)  # until it is taken to be ready
print("an error of its own", flush=True)
{then}
sys.exit(3)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


def front(model: Path, folder: Path, *options: str, first: str = "", then: str = "", chatter: int = 0, young: float = 100, **how: object) -> tuple[int, list[str], list[float]]:
    """Exit status, lines on stderr, and when the stand-in was started. young: seconds after which its end is not one of a row."""
    (folder / "bin").mkdir()
    log, program = folder / "starts", folder / "bin" / "llama-server"
    program.write_text(STAND_IN.format(python=sys.executable, log=str(log), first=first, then=then, chatter=chatter))
    program.chmod(0o755)
    code = f"import sys; from kvcapsule_gguf.server import cli, launch; launch.PAUSE_S, launch.YOUNG_S = 0.1, {young}; sys.exit(cli.main())"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KVCAPSULE_LIB": str(folder)}
    done = subprocess.run([sys.executable, "-c", code, str(model), "--port", "0", *options], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, **how)  # type: ignore[call-overload]
    return done.returncode, done.stderr.splitlines(), [float(line) for line in log.read_text().split()]


def test_one_that_ends_at_each_start_is_given_up(model: Path, tmp_path: Path) -> None:
    """With a pause before each start that is twice as long as the one before, and one line for each."""
    status, lines, starts = front(model, tmp_path)
    assert status == 1 and len(starts) == 5
    ended = "kvcapsule-server: llama-server ended with status 3: an error of its own; it is started again"
    assert lines[1:5] == [ended, f"{ended} in 0.1 s", f"{ended} in 0.2 s", f"{ended} in 0.4 s"] and "listening" in lines[0]
    assert lines[5:] == ["kvcapsule-server: error: llama-server ended with status 3: an error of its own; it is not started again, since it has ended 5 times in a row"]
    assert all(later - earlier > pause for earlier, later, pause in zip(starts[1:], starts[2:], (0.1, 0.2, 0.4)))


def test_one_that_has_run_for_a_while_is_always_started_again(model: Path, tmp_path: Path) -> None:
    """Here until the seventh one sends Ctrl-C to the front, whose status is then 0: it has ended in order."""
    status, lines, starts = front(model, tmp_path, then="if n == 7: os.kill(os.getppid(), signal.SIGINT); time.sleep(60)", young=0)
    assert (status, len(starts)) == (0, 7)
    assert sum(line.endswith("; it is started again") for line in lines) == 6 and "stopping" in lines[-1]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["I srv load_model: loading model 'kvcapsule_gguf/x.gguf'", "W a warning: failed", "E ggml_aligned_malloc: insufficient memory", "E load_model: failed to create_context"], "ggml_aligned_malloc: insufficient memory"),
        (["E no such flag", "E capsule 'x.gguf': damaged", "E failed"], "capsule 'x.gguf': damaged"),
        (["E of a client", "ggml.c:9: GGML_ASSERT(false) failed"], "ggml.c:9: GGML_ASSERT(false) failed"),
        (["I all is well"], None), (["./llama-server: error while loading shared libraries: libx.so"], "./llama-server: error while loading shared libraries: libx.so"),
    ],
)  # fmt: skip
def test_the_line_that_says_why(model: Path, tmp_path: Path, lines: list[str], said: str | None) -> None:
    """llama-server writes errors, warnings and information one after the other, and paths that have the word capsule in them."""
    log = [f"0.00.012.251 {line}" if line[1] == " " else line for line in lines]
    status, shown, starts = front(model, tmp_path, first=f"print({chr(10).join(log)!r}, flush=True); sys.exit(4)")
    assert (status, len(starts)) == (1, 1)
    assert shown[-1] == "kvcapsule-server: error: llama-server ended with status 4" + (f": {said}" if said else "")


@pytest.mark.parametrize("closed", ["from the start", "later"])
def test_a_log_that_nobody_reads_any_more_does_not_stop_it(model: Path, tmp_path: Path, closed: str) -> None:
    """With -v the log goes to stderr. It is far longer than a pipe is, and after it /health has to be answered."""
    read, write = os.pipe()
    os.close(read)
    end = (lambda: os.close(2)) if closed == "from the start" else (lambda: os.dup2(write, 2))
    try:
        status, lines, starts = front(model, tmp_path, "-v", then="os.kill(os.getppid(), 15); time.sleep(60)", chatter=5000, preexec_fn=end)
    finally:
        os.close(write)
    assert (status, lines, len(starts)) == (0, [], 1)
