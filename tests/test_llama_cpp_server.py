"""python -m llama_cpp.server, llama-cpp-python's own and unmodified, takes the library and the capsule from the environment."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from chat_model import PATCH, write_mmproj, write_model, write_picture
from conftest import ROOT, library
from make_capsule import random_capsule
from test_native import require_capsules

CONTEXT, HOT = 2048, 768
IMAGE = 24 * PATCH
TOKENS = 24 * 24  # one picture fits into the hot cells, two do not
NEEDED = ("openai", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings", "yaml")
START_TIMEOUT = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_capsules()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        why = f"llama_cpp.server needs {', '.join(missing)}: scripts/setup --stock"
        pytest.fail(why) if os.environ.get("CI", "").lower() in ("1", "true") else pytest.skip(why)
    root = tmp_path_factory.mktemp("server")
    model = write_model(root / "tiny.gguf")
    write_mmproj(root / "mmproj-tiny.gguf", image=IMAGE)
    lossless = random_capsule(model, root / "lossless.gguf")
    (root / "damaged.gguf").write_bytes(lossless.read_bytes()[: lossless.stat().st_size // 2])
    write_picture(root / "a.png")
    write_picture(root / "b.png", seed=4)
    return root


class Server:
    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process, self.log_path, self.port = process, log, 0

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait(self) -> None:
        """Until it listens, or has ended (then `port` stays 0)."""
        deadline = time.monotonic() + START_TIMEOUT
        while not self.port and time.monotonic() < deadline:
            ended = self.process.poll() is not None  # before the log is read: nothing comes after
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", self.log):
                self.port = int(found[1])
            elif ended:
                return
            else:
                time.sleep(0.05)
        assert self.port, f"does not listen after {START_TIMEOUT} s\n{self.log[-2000:]}"

    def chat(self, *said: str | Path) -> dict:
        """The answer to text and pictures, greedily."""
        parts = [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(part.read_bytes()).decode()}}
            if isinstance(part, Path)
            else {"type": "text", "text": part}
            for part in said
        ]
        body = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 12}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json", "Authorization": "Bearer sk-x"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
            return json.load(reply)


def content(reply: dict) -> str:
    return reply["choices"][0]["message"]["content"]


@contextmanager
def serve(folder: Path, capsule: str | None) -> Iterator[Server]:
    lib = str(library("patched"))
    # the server itself reads HOST, PORT, ... from the environment
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "MTMD_", "KVCAPSULE_")) and k not in ("HOST", "PORT", "CONFIG_FILE", "API_KEY")}
    env |= {"LLAMA_CPP_LIB_PATH": lib, "MTMD_CPP_LIB": lib}
    if capsule:
        env |= {"LLAMA_KVCAPSULE": capsule if capsule == "auto" else str(folder / capsule), "LLAMA_KVCAPSULE_HOT": str(HOT)}
    options = {
        "model": folder / "tiny.gguf", "clip_model_path": folder / "mmproj-tiny.gguf", "chat_format": "mtmd", "n_ctx": CONTEXT,
        "api_key": "sk-x", "n_threads": 1, "n_threads_batch": 1, "verbose": "true", "host": "127.0.0.1", "port": 0,
    }  # fmt: skip
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    log = folder / f"{capsule}.log"
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "llama_cpp.server", *arguments], env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        yield Server(process, log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[dict[str | None, Server]]:
    """All of them at once: most of their time goes into starting."""
    with ExitStack() as stack:
        yield {capsule: stack.enter_context(serve(folder, capsule)) for capsule in (None, "lossless.gguf", "damaged.gguf", "auto")}


def test_pictures_from_slots(folder: Path, servers: dict[str | None, Server]) -> None:
    plain, ours = servers[None], servers["lossless.gguf"]
    question = (folder / "a.png", folder / "b.png", "what?")
    text = "x" * HOT  # which nothing compresses
    for server in (plain, ours):
        server.wait()
        assert server.port, server.log[-2000:]
    assert "capsule" not in plain.log
    assert re.search(rf"capsule '{re.escape(str(folder / 'lossless.gguf'))}', .*, {HOT} hot cells of {CONTEXT}", ours.log)

    expected, answer = plain.chat(*question), ours.chat(*question)
    assert len(content(answer)) == 12 and content(answer) == content(expected)
    assert answer["usage"]["prompt_tokens"] > 2 * TOKENS > HOT

    # the hot cells grow with text
    assert len(content(plain.chat(text))) == 12 and content(ours.chat(text)) == content(plain.chat(text))
    assert content(ours.chat(*question)) == content(expected)


def test_the_openai_client(folder: Path, servers: dict[str | None, Server]) -> None:
    import openai_client

    pictures = [folder / "a.png", folder / "b.png"]
    for server in (servers[None], servers["lossless.gguf"]):
        server.wait()
    answers = [openai_client.check(openai_client.client(server.port), pictures, TOKENS) for server in (servers[None], servers["lossless.gguf"])]
    assert answers[0] == answers[1] and answers[0][0] != answers[0][1]
    openai_client.check_key(servers[None].port)


def test_the_built_in_capsule(folder: Path, servers: dict[str | None, Server]) -> None:
    """More pictures than there are hot cells."""
    server = servers["auto"]
    server.wait()
    assert re.search(rf"the built-in capsule, quality 1.00 \(6.* times smaller\), {HOT} hot cells of {CONTEXT}", server.log)
    answer = server.chat(folder / "a.png", folder / "b.png", "what?")
    assert len(content(answer)) == 12 and answer["usage"]["prompt_tokens"] > 2 * TOKENS > HOT


def test_a_damaged_capsule(folder: Path, servers: dict[str | None, Server]) -> None:
    server = servers["damaged.gguf"]
    server.wait()
    assert not server.port and server.process.returncode != 0
    (line,) = (x for x in server.log.splitlines() if "capsule" in x.replace(str(folder), ""))
    assert "failed to initialize the context" in line and "damaged.gguf': " in line


def test_several_clients_and_bad_requests(folder: Path) -> None:
    """The short form of scripts/server_load."""
    env = {**os.environ, "KVCAPSULE_LIB": str(library("patched"))}
    arguments = ["--server", "llama_cpp", "--clients", "3", "--requests", "3", "--images", "2", "--pictures", "2", "--json"]
    done = subprocess.run([sys.executable, ROOT / "scripts" / "server_load", *arguments], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads(done.stdout)["requests"] == 9
