"""kvcapsule-server with the real llama-server. `scripts/setup --tools` builds it; without it these tests are skipped (about nine minutes of one core: too long for every CI run)."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import openai_client
import pytest
from chat_model import PATCH, TEMPLATE, write_mmproj, write_model, write_picture
from conftest import ROOT, library, require_server
from make_capsule import random_capsule
from PIL import Image

IMAGE = 24 * PATCH
TOKENS = 24 * 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_server()
    root = tmp_path_factory.mktemp("server")
    model = write_model(root / "tiny.gguf", template=TEMPLATE)
    write_mmproj(root / "mmproj-tiny.gguf", image=IMAGE)
    random_capsule(model, root / "lossless.gguf")
    (root / "damaged.gguf").write_bytes((root / "lossless.gguf").read_bytes()[:9000])
    for name, seed in (("a.png", 3), ("b.png", 4)):
        write_picture(root / name, seed=seed)
    return root


@contextmanager
def serve(folder: Path, *arguments: str | Path, model: Path | None = None) -> Iterator[tuple[subprocess.Popen, int, Path]]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_")} | {"KVCAPSULE_LIB": str(library("patched")), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kvcapsule_gguf.server.cli", model or folder / "tiny.gguf", "--port", "0", "--api-key", "sk-x", "-c", "4096", "-t", "1", "-tb", "1", *arguments]
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(list(map(str, command)), env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        port, deadline = 0, time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            found = re.search(r"127\.0\.0\.1:(\d+)", log.read_text())
            try:
                if found and openai_client.client(port := int(found[1])).models.list():
                    break
            except (openai.InternalServerError, openai.APIConnectionError):
                pass
            time.sleep(0.1)
        yield process, port, log
    finally:
        process.kill()
        process.wait()


def test_the_openai_client_with_and_without_a_capsule(folder: Path) -> None:
    """Four slots of one unified cache; fewer hot cells than two pictures need."""
    pictures, answers = [folder / "a.png", folder / "b.png"], []
    for arguments in (("--capsule", "off"), ("--capsule", folder / "lossless.gguf", "--hot", "1024")):
        with serve(folder, *arguments) as (process, port, log):
            answers.append(openai_client.check(openai_client.client(port), pictures, TOKENS))
            openai_client.check_key(port)
            with pytest.raises(openai.BadRequestError):
                openai_client.client(port).chat.completions.create(model="x", messages=openai_client.messages("?", log))
            with pytest.raises(openai.BadRequestError, match="exceed"):
                openai_client.client(port).chat.completions.create(model="x", messages=openai_client.messages("x" * 5000))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text()
    assert answers[0] == answers[1] and answers[0][0] != answers[0][1]


def test_a_stream_is_finished_before_the_end(folder: Path) -> None:
    with serve(folder, "--capsule", folder / "lossless.gguf") as (process, port, log):
        stream = openai_client.client(port).chat.completions.create(model="x", messages=openai_client.messages("?", folder / "a.png"), max_tokens=200, temperature=0, stream=True)
        pieces = [next(stream)]
        process.send_signal(signal.SIGTERM)
        pieces += list(stream)
        assert pieces[-1].choices[0].finish_reason == "length" and sum(bool(p.choices[0].delta.content) for p in pieces) > 150
        assert process.wait(60) == 0 and "stopping" in log.read_text()


def test_a_damaged_capsule_is_one_line(folder: Path) -> None:
    with serve(folder, "--capsule", folder / "damaged.gguf") as (process, _, log):
        assert process.wait(60) == 1
    lines = [line for line in log.read_text().splitlines() if "listening" not in line]
    assert len(lines) == 1 and "damaged.gguf" in lines[0]


def test_without_a_file_the_built_in_capsule_is_used(folder: Path) -> None:
    """llama-server itself says so, and a model that is not supported goes without."""
    with serve(folder, "--quality", "0.6", "-v", "-lv", "4") as (_, port, log):
        assert "(capsule: built in, quality 0.6; one from kvcapsule-train saves more; 4 slots, API key)" in log.read_text()
        assert openai_client.client(port).chat.completions.create(model="x", messages=openai_client.messages("?", folder / "a.png"), max_tokens=2).usage.prompt_tokens > TOKENS
        assert "the built-in capsule, quality 0.60" in log.read_text()
    (folder / "other").mkdir()
    model = write_model(folder / "other" / "tiny.gguf", arch="xverse", template=TEMPLATE)
    write_mmproj(folder / "other" / "mmproj-tiny.gguf", image=IMAGE)
    with serve(folder, model=model) as (_, port, log):
        assert openai_client.client(port).chat.completions.create(model="x", messages=openai_client.messages("?", folder / "a.png"), max_tokens=2).usage.prompt_tokens > TOKENS
        assert "the architecture 'xverse' is not supported, continuing without it" in log.read_text()


def inner(process: subprocess.Popen) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_when_llama_server_is_killed_it_is_started_again(folder: Path) -> None:
    """Who waits for an answer is told; one line says what happened, and nothing of the log of its start."""
    with serve(folder, "--capsule", folder / "lossless.gguf") as (process, port, log):
        api = openai_client.client(port)
        first = inner(process)
        stream = api.chat.completions.create(model="x", messages=openai_client.messages("?"), max_tokens=3000, stream=True)
        next(stream)
        os.kill(first, signal.SIGSEGV)
        with pytest.raises(openai.APIError, match="started again"):
            list(stream)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                openai_client.check(api, [folder / "a.png"], TOKENS)
                break
            except openai.InternalServerError as error:
                assert error.status_code == 503 and error.response.headers["retry-after"]
                time.sleep(0.1)
        assert inner(process) != first
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    lines = log.read_text().splitlines()
    assert lines[1].endswith("llama-server was ended by SIGSEGV; it is started again") and [line.split()[1] for line in lines] == ["listening", "llama-server", "stopping:"]


def test_health_and_models_while_all_slots_are_busy(folder: Path) -> None:
    with serve(folder, "--capsule", "off", "-np", "1") as (process, port, _):
        api = openai_client.client(port)
        body = json.dumps({"prompt": "?", "n_predict": 3000, "stream": True}).encode()
        busy = [socket.create_connection(("127.0.0.1", port)) for _ in range(12)]
        for client in busy:
            client.sendall(b"POST /completion HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert select.select(busy, [], [], 60)[0][0].recv(12) == b"HTTP/1.1 200"
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60).read() == b'{"status":"ok"}'
        assert api.models.list().data
        for client in busy:
            client.close()
        assert api.chat.completions.create(model="x", messages=openai_client.messages("?"), max_tokens=1).choices


@pytest.mark.parametrize("model", ["kvdemo-8M-v1-F16.gguf", "mrope/kvdemo-mrope-8M-v1-F16.gguf"])
def test_answers_obey_a_json_schema(folder: Path, model: str, tmp_path: Path) -> None:
    """Unpatched llama-server answers 500 here: patches/0007."""
    path = ROOT / "kvcapsule_gguf" / "demo" / model
    picture = tmp_path / "scene.png"
    Image.open(ROOT / "kvcapsule_gguf" / "demo" / "scene-1.jpg").save(picture)
    schema = {"type": "object", "properties": {"a": {"enum": ["yellow star", "red circle"]}}, "required": ["a"], "additionalProperties": False}
    with serve(folder, "-c", "2048", model=path) as (_, port, _):
        create = openai_client.client(port).chat.completions.create
        for pictures in ([], [picture]):
            options: dict = {"model": "x", "messages": openai_client.messages("What is at the top right?", *pictures), "temperature": 0, "max_tokens": 60}
            reply = create(**options, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
            answer = json.loads(reply.choices[0].message.content or "")
            assert set(answer) == {"a"} and answer["a"] in ("yellow star", "red circle")
            pieces = create(**options, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, stream=True)
            assert json.loads("".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)) == answer
        reply = create(**{**options, "max_tokens": 400}, response_format={"type": "json_object"})
        assert (reply.choices[0].message.content or "").lstrip()[0] == "{"


@pytest.mark.parametrize("arguments", [["--clients", "4", "--requests", "6", "--images", "6", "--pictures", "3"]])
def test_many_clients(folder: Path, arguments: list[str]) -> None:
    """The short form of scripts/server_load: four slots, mixed requests, every answer that of its own picture."""
    env = {**os.environ, "KVCAPSULE_LIB": str(library("patched"))}
    done = subprocess.run([sys.executable, ROOT / "scripts" / "server_load", "--json", *arguments], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["requests"] == 24 and report["different_answers"] > 3
