"""The front of kvcapsule-server, before a stand-in for llama-server: limits, errors, streams, clients that go away, the end."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import socket
import socketserver
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from kvcapsule_gguf.server import args
from kvcapsule_gguf.server.errors import RequestError
from kvcapsule_gguf.server.gateway import Gateway
from kvcapsule_gguf.server.media import Limits, checked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Unix sockets")
LIMITS = Limits(body_bytes=1 << 20, image_bytes=1 << 18, pixels=1e6, remote_images=False)
CHAT = "/v1/chat/completions"


class Fake(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64


class FakeHandler(BaseHTTPRequestHandler):
    """The path says what to do; what arrives is noted."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, dict[str, str], bytes]] = []
    closed = threading.Event()
    go_on = threading.Event()

    def address_string(self) -> str:
        return "-"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        type(self).seen.append((f"{self.command} {self.path}", dict(self.headers), body))
        if self.path == "/stream":
            self.stream()
        elif self.path == "/slow":
            self.connection.settimeout(10)
            if self.connection.recv(1) == b"":
                type(self).closed.set()
        elif self.path == "/dies":
            self.close_connection = True
        elif self.path.startswith("/error/"):
            _, _, status, text = self.path.split("/")
            kind, data = ("text/plain", text) if status == "500plain" else ("application/json", json.dumps({"error": {"code": 500, "message": text.replace("_", " "), "type": "x"}}))
            self.reply(int(status[:3]), kind, data.encode())
        else:
            self.reply(200, "application/json", b'{"ok": true}')

    do_POST = do_DELETE = do_GET

    def reply(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self.chunk(b"data: 1\n\n")
            type(self).go_on.wait(10)
            for n in range(2000):
                self.chunk(b"data: %d\n\n" % n if n < 1999 else b"data: [DONE]\n\n")
                if n < 40:
                    time.sleep(0.01)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            type(self).closed.set()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


class Running:
    def __init__(self, limits: Limits, keys: list[str]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "s"
        self.fake = Fake(str(path), FakeHandler)
        threading.Thread(target=self.fake.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.upstream: Any = SimpleNamespace(socket=path, token="inner", process=SimpleNamespace(poll=lambda: None))
        self.gateway = Gateway(("127.0.0.1", 0), self.upstream, limits, keys)
        self.port = self.gateway.server_address[1]
        threading.Thread(target=self.gateway.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        FakeHandler.seen.clear()
        FakeHandler.closed.clear()
        FakeHandler.go_on.clear()

    def send(self, path: str, body: bytes | None = None, method: str | None = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method or ("POST" if body is not None else "GET"), path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            reply = connection.getresponse()
            data = reply.read()
            assert reply.status < 400 or reply.getheader("Content-Type", "").startswith("application/json"), data
            return reply.status, json.loads(data)
        finally:
            connection.close()

    def raw(self, data: bytes) -> bytes:
        """The answer to bytes as they are."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as client:
            client.sendall(data)
            got = b""
            while piece := client.recv(65536):
                got += piece
        return got

    def close(self) -> None:
        FakeHandler.go_on.set()
        if not self.gateway.draining:
            self.gateway.shutdown()
            self.gateway.server_close()
        self.fake.shutdown()
        self.fake.server_close()
        self.folder.cleanup()


@pytest.fixture
def front(request: pytest.FixtureRequest) -> Iterator[Running]:
    running = Running(LIMITS, getattr(request, "param", []))
    yield running
    running.close()


def message(answer: tuple[int, Any], status: int) -> str:
    assert answer[0] == status, answer
    assert answer[1]["error"]["code"] == status and answer[1]["error"]["type"]
    return answer[1]["error"]["message"]


def picture(kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, kind)
    return data.getvalue()


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def ask(*urls: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": u}} for u in urls]}]}).encode()


# --- keys and limits ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("front", [["one", "two"]], indirect=True)
def test_keys(front: Running) -> None:
    assert "API Key" in message(front.send(CHAT, b"{}"), 401)
    assert "API Key" in message(front.send(CHAT, b"{}", Authorization="Bearer three"), 401)
    assert FakeHandler.seen == []
    assert front.send(CHAT, b"{}", Authorization="Bearer two")[0] == 200
    assert front.send(CHAT, b"{}", X_Api_Key="one")[0] == 200
    assert all(headers["Authorization"] == "Bearer inner" and "X-Api-Key" not in headers for _, headers, _ in FakeHandler.seen)
    # what is public llama-server decides, which then sees no key
    assert front.send("/health")[0] == 200 and "Authorization" not in FakeHandler.seen[-1][1]


def test_oversized_and_malformed_requests(front: Running) -> None:
    big = b'{"x": "' + b"x" * (2 << 20) + b'"}'
    assert "at most 1" in message(front.send(CHAT, big), 413)
    assert "JSON" in message(front.send(CHAT, b'{"messages": ['), 400)
    assert message(front.send(CHAT, b"[" * 100_000 + b"]" * 100_000), 400)
    for data, status in (
        (b"nonsense\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n", 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n", 413),
        (b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9999999\r\n\r\n", 413),
        (b"BREW / HTTP/1.1\r\n\r\n", 501),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
    ):
        head, _, body = front.raw(data).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), (data[:60], head)
        assert json.loads(body)["error"]["code"] == status
    assert FakeHandler.seen == []
    # and after all that it still works, chunks included
    assert b"200 OK" in front.raw(b"POST / HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n")
    assert FakeHandler.seen[-1][2] == b"{}"


def bomb(width: int, height: int) -> bytes:
    """A PNG header that promises so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    piece = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", head) + piece(b"IDAT", zlib.compress(b"\0" * 100)) + piece(b"IEND", b"")


@pytest.mark.parametrize(
    "bad, status, words",
    [
        ("http://example.com/x.png", 400, "--remote-images"),
        ("HTTPS://example.com/x.png", 400, "--remote-images"),
        ("httpx", 400, "--remote-images"),
        ("file:///etc/passwd", 400, "data:"),
        ("data:text/html;base64,aGVsbG8=", 400, "data:image"),
        ("data:image/png,hello", 400, "base64"),
        ("data:image/png;base64,####", 400, "base64"),
        (url(b"hello"), 400, "cannot be read"),
        ("", 400, "cannot be read"),
        (url(bomb(60_000, 60_000)), 413, "pixels"),
        (url(bomb(2000, 1000)), 413, "pixels"),
        (url(picture() + bytes(1 << 18)), 413, "MiB"),
    ],
)
def test_bad_pictures(front: Running, bad: str, status: int, words: str) -> None:
    assert words in message(front.send(CHAT, ask(url(picture()), bad)), status)
    assert FakeHandler.seen == []


def test_good_pictures_pass_unchanged(front: Running) -> None:
    body = ask(url(picture()), url(picture("JPEG"), "jpeg"), base64.b64encode(picture("GIF")).decode())
    assert front.send(CHAT, body)[0] == 200 and FakeHandler.seen[-1][2] == body


@pytest.mark.parametrize(
    "request_of",
    [
        lambda u: {"input": [{"content": [{"type": "input_image", "image_url": u}]}]},
        lambda u: {"messages": [{"content": [{"type": "image", "source": {"type": "url", "url": u}}]}]},
        lambda u: {"messages": [{"content": [{"type": "tool_result", "content": [{"type": "image", "source": {"type": "base64", "data": u}}]}]}]},
        lambda u: {"prompt": {"prompt_string": "x", "multimodal_data": ["", u][1:]}},
    ],
)
def test_pictures_of_the_other_apis_are_checked_too(request_of: Any) -> None:
    for bad in ("http://example.com/x.png", base64.b64encode(b"hello").decode()):
        with pytest.raises(RequestError):
            checked(json.dumps(request_of(bad)).encode(), LIMITS)
    good = json.dumps(request_of(base64.b64encode(picture()).decode())).encode()
    assert checked(good, LIMITS) == good


@pytest.mark.parametrize("part", [{"video_url": {"url": "http://x/y"}}, {"input_video": {"data": "https://x/y"}}, {"input_audio": {"url": "HTTP://x/y", "format": "wav"}}, {"video_url": "http://x"}])
def test_sound_and_film_are_not_fetched_either(part: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="other servers"):
        checked(json.dumps({"messages": [{"content": [part]}]}).encode(), LIMITS)


def test_kinds_that_llama_server_does_not_read_become_png(front: Running) -> None:
    front.send(CHAT, ask(url(picture("WEBP"), "webp")))
    sent = json.loads(FakeHandler.seen[-1][2])["messages"][0]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(sent.partition(",")[2]))) as image:
        assert (image.format, image.size) == ("PNG", (8, 6))


def test_remote_pictures_when_allowed() -> None:
    body = ask("http://example.com/x.png")
    assert checked(body, Limits(1 << 20, 1 << 20, 1e6, remote_images=True)) == body


# --- errors of llama-server --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, status, words",
    [
        ("/error/500/Failed_to_load_image_or_audio_file", 400, "Failed to load"),
        ("/error/500/Context_size_has_been_exceeded.", 503, "--hot"),
        ("/error/500plain/oops", 500, "oops"),
        ("/error/400/no_messages", 400, "no messages"),
        ("/error/500/unknown", 500, "unknown"),
        ("/dies", 502, "broke off"),
    ],
)
def test_its_errors_get_the_right_status_and_form(front: Running, path: str, status: int, words: str) -> None:
    code, body = front.send(path, b"{}")
    assert code == status and words in body["error"]["message"]


def test_when_it_is_not_there(front: Running) -> None:
    front.upstream.socket = Path("/nowhere")
    assert "Loading" in message(front.send("/health"), 503)
    front.upstream.process.poll = lambda: 1
    assert "ended" in message(front.send("/health"), 503)


# --- streams and clients that go away ----------------------------------------------------------------------------------------------------------


def start(front: Running, path: str) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", front.port), timeout=20)
    client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode())
    return client


def test_a_stream_is_passed_on_as_it_comes(front: Running) -> None:
    with start(front, "/stream") as client:
        got = client.recv(65536)
        while b"data: 1" not in got:
            got += client.recv(65536)
        assert b"chunked" in got and b"DONE" not in got
        FakeHandler.go_on.set()
        while not got.endswith(b"0\r\n\r\n"):
            got += client.recv(65536)
    assert got.count(b"data: ") == 2001


@pytest.mark.parametrize("path", ["/slow", "/stream"])
def test_a_client_that_goes_away_ends_the_work(front: Running, path: str) -> None:
    with start(front, path) as client:
        if path == "/stream":
            while b"data: 1" not in client.recv(65536):
                pass
        else:
            time.sleep(0.2)
    FakeHandler.go_on.set()
    assert FakeHandler.closed.wait(10)
    assert front.send("/health")[0] == 200


def test_many_requests_on_one_connection(front: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=20)
    for _ in range(3):
        connection.request("POST", CHAT, ask(url(picture())))
        reply = connection.getresponse()
        assert reply.status == 200 and json.loads(reply.read()) == {"ok": True}
    connection.close()


def test_the_end_waits_for_streams_and_takes_nothing_new(front: Running) -> None:
    with start(front, "/stream") as client:
        while b"data: 1" not in client.recv(65536):
            pass
        ended: list[bool] = []
        waiting = threading.Thread(target=lambda: ended.append(front.gateway.drain(20)))
        waiting.start()
        time.sleep(0.3)
        assert not ended
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", front.port), timeout=2).close()
        FakeHandler.go_on.set()
        got = b""
        while not got.endswith(b"0\r\n\r\n"):
            got += client.recv(65536)
        waiting.join(20)
    assert ended == [True] and b"[DONE]" in got


def test_the_end_does_not_wait_for_ever(front: Running) -> None:
    with start(front, "/stream") as client:
        while b"data: 1" not in client.recv(65536):
            pass
        assert not front.gateway.drain(0.2)


# --- command line ------------------------------------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "keys").write_text("# ours\n\nk1\nk2\n")
    options = args.parse(["m.gguf", "--api-key-file", str(tmp_path / "keys"), "--api-key", "k0", "-ngl", "99", "--hot", "512", "-fa", "on"], {})
    assert (options.model, options.api_keys, options.n_hot, options.rest) == (Path("m.gguf"), ["k0", "k1", "k2"], 512, ["-ngl", "99", "-fa", "on"])
    env = {"LLAMA_ARG_MODEL": "e.gguf", "LLAMA_API_KEY": "secret", "LLAMA_ARG_HOT": "7", "LLAMA_KVCAPSULE": "c.gguf", "LLAMA_ARG_PORT": "9"}
    options = args.parse([], env)
    assert (options.model, options.api_keys, options.n_hot, options.capsule, options.port) == (Path("e.gguf"), ["secret"], 7, "c.gguf", 9)
    for bad in ([], ["m.gguf", "-m", "n.gguf"], ["m.gguf", "-hf", "u/r"], ["m.gguf", "--port", "x"], ["m.gguf", "--max-body-mib", "0"], ["m.gguf", "--api-key-file", "/no"]):
        with pytest.raises(SystemExit) as end:
            args.parse(bad, {})
        assert end.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_without_llama_server_one_line_says_how_to_build_it(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcapsule_gguf.server import cli

    monkeypatch.setenv("KVCAPSULE_LIB", str(tmp_path))
    assert cli.main(["m.gguf"]) == 1
    assert "scripts/setup --tools" in capsys.readouterr().err


def test_keys_are_not_on_the_command_line_of_llama_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A stand-in for the program writes down what it was given, and ends with an error."""
    from chat_model import write_model

    from kvcapsule_gguf.server import cli

    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "llama-server"
    program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/argv\nenv > {tmp_path}/env\necho 'capsule x is damaged: no' >&2\nexit 3\n")
    os.chmod(program, 0o755)
    monkeypatch.setenv("KVCAPSULE_LIB", str(tmp_path))
    model = write_model(tmp_path / "tiny.gguf")
    assert cli.main([str(model), "--port", "0", "--api-key", "sk-secret", "-ngl", "1"]) == 1
    argv, env = (tmp_path / "argv").read_text(), (tmp_path / "env").read_text()
    assert "sk-secret" not in argv + env
    assert "--kv-unified" in argv and "-np 4" in argv and "-c 4096" in argv and "-ngl 1" in argv and "--host" in argv
    assert "capsule x is damaged: no" in capsys.readouterr().err
