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
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from kvcapsule_gguf.runtime import pictures
from kvcapsule_gguf.server import args, connection, gateway, media
from kvcapsule_gguf.server.gateway import Gateway
from kvcapsule_gguf.server.media import Limits

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Unix sockets")
LIMITS = Limits(body_bytes=1 << 20, pictures=pictures.Limits(file_bytes=1 << 18, pixels=1_000_000, total_pixels=3_000_000, count=16), remote_images=False)
CHAT = "/v1/chat/completions"


class Fake(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64


class FakeHandler(BaseHTTPRequestHandler):
    """The path says what to do; what arrives is noted."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, dict[str, str], bytes]] = []
    files: dict[str, bytes] = {}
    said: list[str] = []
    media: Path
    closed = threading.Event()
    go_on = threading.Event()

    def address_string(self) -> str:
        return "-"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        type(self).seen.append((f"{self.command} {self.path}", dict(self.headers), body))
        type(self).files = {path.name: path.read_bytes() for path in type(self).media.iterdir()}
        what = self.path.partition("?")[2]
        if what == "stream":
            self.stream()
        elif what == "slow":
            self.connection.settimeout(10)
            if self.connection.recv(1) == b"":
                type(self).closed.set()
        elif what == "flood":
            self.flood()
        elif what == "cut":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.chunk(b"data: 1\n\n")
            self.close_connection = True
        elif what == "dies":
            self.close_connection = True
        elif what.startswith("error/"):
            _, status, text = what.split("/")
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

    def flood(self) -> None:
        try:
            self.reply(200, "text/plain", bytes(64 << 20))
        except OSError:
            type(self).closed.set()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


def received(client: socket.socket) -> tuple[int, bytes]:
    reply = http.client.HTTPResponse(client)
    reply.begin()
    return reply.status, reply.read()


class Running:
    def __init__(self, limits: Limits, keys: list[str]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "s"
        FakeHandler.media = Path(self.folder.name) / "media"
        FakeHandler.media.mkdir()
        self.fake = Fake(str(path), FakeHandler)
        threading.Thread(target=self.fake.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.upstream: Any = SimpleNamespace(socket=path, media=FakeHandler.media, say=FakeHandler.said.append, token="inner", ready=True, process=SimpleNamespace(poll=lambda: None))
        self.gateway = Gateway(("127.0.0.1", 0), self.upstream, limits, keys)
        self.port = self.gateway.server_address[1]
        self.gateway.start()
        FakeHandler.seen.clear()
        FakeHandler.said.clear()
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

    def raw(self, data: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to bytes as they are, `Host: x` added behind the first line."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as client:
            client.sendall(data.replace(b"\r\n", b"\r\nHost: x\r\n", 1))
            return received(client)

    def close(self) -> None:
        FakeHandler.go_on.set()
        self.gateway.drain(5)
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


# --- keys, framing and limits ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("front", [["one", "zwei-ö"]], indirect=True)
def test_keys(front: Running) -> None:
    assert "API Key" in message(front.send(CHAT, b"{}"), 401)
    assert "API Key" in message(front.send(CHAT, b"{}", Authorization="Bearer three"), 401)
    assert "API Key" in message(front.send("/v1/stream", None, "DELETE"), 401)
    assert FakeHandler.seen == []
    assert front.send(CHAT, b"{}", Authorization="Bearer zwei-ö".encode().decode("latin-1"))[0] == 200
    assert front.send(CHAT, b"{}", X_Api_Key="one")[0] == 200
    assert all(headers["Authorization"] == "Bearer inner" and "X-Api-Key" not in headers for _, headers, _ in lower(FakeHandler.seen))
    # what is public llama-server decides, which then sees no key
    assert front.send("/v1/models")[0] == 200 and "Authorization" not in lower(FakeHandler.seen)[-1][1]


def lower(seen: list[tuple[str, dict[str, str], bytes]]) -> list[tuple[str, dict[str, str], bytes]]:
    return [(line, {name.title(): value for name, value in headers.items()}, body) for line, headers, body in seen]


def test_only_known_headers_reach_llama_server(front: Running) -> None:
    """X-Conversation-Id would let an answer go on after its client left."""
    front.send(CHAT, b"{}", X_Conversation_Id="c", X_Other="x", Accept="text/event-stream", Cookie="c", Content_Type="text/plain")
    assert set(lower(FakeHandler.seen)[0][1]) == {"Host", "Accept", "Accept-Encoding", "Content-Length", "Content-Type", "Authorization", "Connection", "User-Agent"} - missing(FakeHandler.seen)
    assert lower(FakeHandler.seen)[0][1]["Content-Type"] == "application/json"


def missing(seen: list[tuple[str, dict[str, str], bytes]]) -> set[str]:
    """What the client's library may or may not send."""
    return {"User-Agent", "Accept-Encoding", "Connection"} - set(lower(seen)[0][1])


def test_oversized_and_malformed_requests(front: Running) -> None:
    big = b'{"x": "' + b"x" * (2 << 20) + b'"}'
    assert "at most 1" in message(front.send(CHAT, big), 413)
    assert "JSON" in message(front.send(CHAT, b'{"messages": ['), 400)
    post = b"POST /v1/completions HTTP/1.1\r\n"
    for data, status in (
        (b"nonsense\r\n\r\n", 400),
        (post + b"Content-Length: x\r\n\r\n", 400),
        (post + b"Content-Length: -5\r\n\r\n", 400),
        (post + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (post + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400),
        (post + b"Content-Length : 2\r\n\r\n{}", 400),
        (post + b"Transfer-Encoding: xchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400),
        (post + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400),
        (post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (post + b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n", 400),
        (post + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n", 400),
        (post + b"Transfer-Encoding: chunked\r\n\r\n100001\r\n" + bytes(0x100001), 413),
        (post + b"Expect: 100-continue\r\nContent-Length: 9999999\r\n\r\n", 413),
        (post + b"Host: y\r\nContent-Length: 2\r\n\r\n{}", 400),
        (post + b"Content-Type: text/plain\r\nContent-Type: multipart/form-data\r\nContent-Length: 2\r\n\r\n{}", 400),
        (b"BREW / HTTP/1.1\r\n\r\n", 501),
        (b"PUT /props HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 405),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
    ):
        got, body = front.raw(data)
        assert got == status and json.loads(body)["error"]["code"] == status, (data[:99], got, body)
    assert FakeHandler.seen == []
    # and after all that it still works, chunks included
    assert front.raw(post + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n")[0] == 200
    assert FakeHandler.seen[-1][2] == b"{}"


@pytest.mark.parametrize("closes", [{"Connection": "close"}, {"Expect": "100-continue", "Transfer-Encoding": "chunked"}], ids=["urllib", "curl"])
def test_a_client_that_is_still_sending_sees_why_it_is_refused(front: Running, closes: dict[str, str]) -> None:
    """Both send all they have before they read, and the answer ends the connection: without care they would see no more than its reset."""
    size = 32 << 20
    head, tail = (b"%x\r\n" % size, b"\r\n0\r\n\r\n") if "Transfer-Encoding" in closes else (b"", b"")
    lengths = {} if head else {"Content-Length": str(size)}
    with connect(front, HEAD + "".join(f"{name}: {value}\r\n" for name, value in {**closes, **lengths}.items()).encode() + b"\r\n") as client:
        if head:
            assert client.recv(100).startswith(b"HTTP/1.1 100")
        client.sendall(head + bytes(size) + tail)
        status, body = received(client)
        assert status == 413 and json.loads(body)["error"]["code"] == 413 and client.recv(1) == b""


def test_refused_requests_that_are_still_coming_make_room_for_others(front: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_OF_ONE", 4)
    clients = [connect(front, HEAD + b"Content-Length: 99999999\r\n\r\n") for _ in range(4)]
    try:
        assert [received(client)[0] for client in clients] == [413] * 4
        assert front.send("/health")[0] == 200
    finally:
        for client in clients:
            client.close()


def test_text_has_a_limit_of_its_own(front: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-server takes twelve times its bytes."""
    monkeypatch.setattr(gateway, "TEXT_BYTES", 1000)
    assert "beside its pictures" in message(front.send("/completion", json.dumps({"prompt": "a" * 1000}).encode()), 413)
    assert front.send(CHAT, ask(url(picture() + bytes(2000))))[0] == 200


def test_who_needs_more_room_than_there_is_waits(front: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "SHORT_BYTES", 1000)
    front.gateway._front._room._free = gateway.TEXT_COPIES * 3000
    body = json.dumps({"prompt": "a" * 2000}).encode()
    with connect(front, b"POST /completion?slow HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body):
        assert front.send("/completion", b'{"prompt": "a"}')[0] == 200  # short ones do not wait
        waiting = connect(front, b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        waiting.settimeout(0.5)
        with pytest.raises(TimeoutError):
            waiting.recv(1)
    waiting.settimeout(20)
    with waiting:
        assert received(waiting)[0] == 200
    assert front.gateway._front._room._free == gateway.TEXT_COPIES * 3000


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 200 + b"1" + b"}" * 200, b'{"temperature": NaN}', b'{"temperature": 1e400}', b'{"temperature": -Infinity}', '{"a": 1}'.encode("utf-16"), b'{"a": "\xff"}', b'{"a": "\\ud800"}', b'\xef\xbb\xbf{}', b'{"n": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_what_is_no_json_is_the_clients_fault(front: Running, body: bytes) -> None:
    assert message(front.send("/completion", body), 400) and FakeHandler.seen == []


@pytest.mark.parametrize("kind, status", [("multipart/form-data; boundary=x", 415), ("Application/JSON; charset=UTF-8", 200), ("application/json; x=multipart", 200), ("application/json; charset=utf-16", 415), ("image/png", 415)])
def test_content_types_are_read_not_searched(front: Running, kind: str, status: int) -> None:
    """What is taken is checked as JSON whatever it says."""
    assert front.send(CHAT, ask(url(picture())), Content_Type=kind)[0] == status
    assert front.send(CHAT, ask("http://127.0.0.1:1/x.png"), Content_Type=kind)[0] == max(status, 400)
    assert front.send(CHAT, b"{}", Content_Encoding="gzip")[0] == 415


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Host": "evil.example"}, 403), ({"Host": "evil.example:8080"}, 403), ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200), ({"Host": "kvcapsule"}, 200), ({"Host": "[::1]:80"}, 200), ({"Host": "my.box.lan:80"}, 200), ({"Host": "10.1.2.3"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
    ],
)  # fmt: skip
def test_a_web_page_cannot_use_a_server_without_a_key(front: Running, headers: dict[str, str], status: int) -> None:
    """Browsers name the page's origin, or, when the page's own name was pointed here, that name as the host."""
    assert front.send(CHAT, b"{}", **headers)[0] == status and front.send("/props", **headers)[0] == status


@pytest.mark.parametrize("front", [["key"]], indirect=True)
def test_with_a_key_web_pages_are_welcome(front: Running) -> None:
    assert front.send(CHAT, b"{}", Host="a.example", Origin="https://b.example", Authorization="Bearer key")[0] == 200
    assert lower(FakeHandler.seen)[0][1]["Origin"] == "https://b.example"


def test_paths_that_are_not_known_are_not_passed_on(front: Running) -> None:
    for path, status in (("/v1/chat%2Fcompletions", 404), ("//completion", 404), ("/completion/", 404), ("/predict", 404), ("/cors-proxy", 404), ("/v1/audio/transcriptions", 501)):
        assert message(front.send(path, b"{}"), status)
    assert FakeHandler.seen == []
    assert front.send("/slots/0?action=erase", b"{}")[0] == 200 and FakeHandler.seen[0][0] == "POST /slots/0?action=erase"


def test_health_is_answered_here(front: Running) -> None:
    front.upstream.socket.unlink()  # nobody behind
    assert front.send("/health") == (200, {"status": "ok"}) == front.send("/v1/health")
    front.upstream.ready = False
    assert "Loading" in message(front.send("/health"), 503)


# --- pictures ----------------------------------------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG header that promises so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    piece = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", head) + piece(b"IDAT", zlib.compress(b"\0" * 100)) + piece(b"IEND", b"")


def two_sizes() -> bytes:
    """A JPEG with two size markers: Pillow reads one, stb_image the other."""
    size = lambda w, h: b"\xff\xc0" + struct.pack(">HBHHBBBB", 11, 8, h, w, 1, 1, 0x11, 0)  # noqa: E731
    good = picture("JPEG")
    at = good.index(b"\xff\xc0")
    return good[:at] + size(20_000, 20_000) + good[at:]


@pytest.mark.parametrize(
    "bad, status, words",
    [
        ("http://example.com/x.png", 400, "--remote-images"),
        ("HTTPS://example.com/x.png", 400, "--remote-images"),
        ("httpx", 400, "picture 2"),
        ("file:///etc/passwd", 400, "data:"),
        ("data:text/html;base64,aGVsbG8=", 400, "not a picture"),
        ("data:image/png;base64,####", 400, "base64"),
        (url(b"hello"), 400, "not a picture"),
        (url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"), 400, "not a picture"),
        (url(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"), 400, "not a picture"),
        ("", 400, "picture 2"),
        (url(two_sizes()), 400, "damaged"),
        (url(bomb(60_000, 60_000)), 413, "too large"),
        (url(bomb(2000, 1000)), 413, "pixels"),
        (url(picture() + bytes(1 << 18)), 413, "MiB"),
    ],
)
def test_bad_pictures(front: Running, bad: str, status: int, words: str) -> None:
    assert words in message(front.send(CHAT, ask(url(picture()), bad)), status)
    assert FakeHandler.seen == []


def test_what_the_pictures_of_a_request_may_be_together(front: Running) -> None:
    assert "at most 16" in message(front.send(CHAT, ask(*[url(picture())] * 17)), 413)
    assert "together" in message(front.send(CHAT, ask(*[url(picture(size=(1000, 900)))] * 4)), 413)
    assert FakeHandler.seen == [] and front.send(CHAT, ask(*[url(picture())] * 16))[0] == 200


def test_what_is_fetched_for_a_request_counts_as_its_body_does(front: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(url: str, most: int, hold: Callable[[int], None]) -> bytes:
        data = picture() + bytes(most - 1000)
        hold(len(data))
        return data

    monkeypatch.setattr(gateway, "fetch", fetch)
    front.gateway._front.limits = replace(LIMITS, remote_images=True)
    site = "http://example.com/x.png"
    assert front.send(CHAT, ask(*[site] * 3))[0] == 200
    FakeHandler.seen.clear()
    assert "fetched" in message(front.send(CHAT, ask(*[site] * 5)), 413)
    assert FakeHandler.seen == [] and front.gateway._front._held == 0


def pixels_seen() -> list[Image.Image]:
    parts = json.loads(FakeHandler.seen[-1][2])["messages"][0]["content"]
    found = []
    for part in parts:
        head, _, name = part["image_url"]["url"].partition("://")
        assert head == "file" and set(part["image_url"]) == {"url"}
        found.append(Image.open(io.BytesIO(FakeHandler.files[name])))
        assert (found[-1].format, found[-1].mode) == ("PPM", "RGB")
    assert len(found) == len(FakeHandler.files)
    return found


def test_llama_server_gets_pixels_and_nothing_of_the_file(front: Running) -> None:
    """Of every kind, in every usual spelling of base64, with the EXIF orientation obeyed and the hidden colours of transparent pixels gone."""
    plain, text = picture(), base64.encodebytes(picture(size=(64, 48))).decode()
    turned, clear = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6), "red").save(turned, "PNG", exif=exif)
    Image.new("RGBA", (8, 6), (255, 0, 0, 0)).save(clear, "PNG")
    spellings = [text, f"DATA:image/png;BASE64,{text}", f"data:;base64,{text.strip()}", "data:application/octet-stream;base64," + text.replace("\n", "").rstrip("="), text.replace("+", "-").replace("/", "_")]
    sent = [url(plain), url(picture("JPEG"), "jpeg"), url(picture("WEBP"), "png"), url(turned.getvalue()), url(clear.getvalue()), *spellings]
    assert front.send(CHAT, ask(*sent))[0] == 200
    seen = pixels_seen()
    red = Image.new("RGB", (8, 6), "red")
    assert seen[0].tobytes() == red.tobytes() and seen[2].size == (8, 6)
    assert seen[3].size == (6, 8) and seen[4].tobytes() == Image.new("RGB", (8, 6), "white").tobytes()
    assert all(image.size == (64, 48) for image in seen[5:])
    wait_until(lambda: not list(FakeHandler.media.iterdir()))
    assert FakeHandler.said == [] and front.send(CHAT, ask(url(picture("JPEG")[:-2])))[0] == 200 and "cut short" in FakeHandler.said[0]


def test_what_all_pictures_on_their_way_may_take(front: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "FOLDER_BYTES", 2 * 64 * 48 * 3 + 100)
    large = url(picture(size=(64, 48)))
    assert front.send(CHAT, ask(large, large))[0] == 200
    wait_until(lambda: not list(FakeHandler.media.iterdir()))
    assert "at once" in message(front.send(CHAT, ask(large, large, large)), 503)
    wait_until(lambda: not list(FakeHandler.media.iterdir()))
    assert front.send(CHAT, ask(large, large))[0] == 200


def wait_until(done: Callable[[], bool]) -> None:
    for _ in range(500):
        if done():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to that in 10 s")


# --- errors of llama-server --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, status, words",
    [
        ("error/500/Failed_to_load_image_or_audio_file", 400, "Failed to load"),
        ("error/500/Failed_to_parse_tools:_Expected", 400, "tools"),
        ("error/500/[json.exception.type_error.302]_type_must_be_string", 400, "string"),
        ("error/500/Context_size_has_been_exceeded.", 503, "-c"),
        ("error/500plain/oops", 500, "oops"),
        ("error/400/no_messages", 400, "no messages"),
        ("error/500/unknown", 500, "unknown"),
        ("dies", 502, "broke off"),
    ],
)
def test_its_errors_get_the_right_status_and_form(front: Running, path: str, status: int, words: str) -> None:
    code, body = front.send("/completion?" + path, b"{}")
    assert code == status and words in body["error"]["message"]


def test_when_it_is_not_there(front: Running) -> None:
    front.upstream.ready = False
    assert "Loading" in message(front.send("/props"), 503) and "Loading" in message(front.send(CHAT, b"{}"), 503)
    front.upstream.ready = True
    front.upstream.socket.unlink()
    front.upstream.process.poll = lambda: -11
    assert "started again" in message(front.send(CHAT, b"{}"), 503)
    head = b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
    with socket.create_connection(("127.0.0.1", front.port), timeout=20) as client:
        client.sendall(head)
        assert b"retry-after: 5" in client.recv(65536)


def test_a_fault_of_the_front_is_said(front: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "finder", lambda path: {}[path])
    assert front.raw(b"POST /tokenize HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")[0] == 500
    assert FakeHandler.said == ["error: POST /tokenize failed in the front: KeyError('/tokenize')"]
    assert front.send("/health")[0] == 200


def test_a_stream_that_llama_server_does_not_finish_says_so(front: Running) -> None:
    """Without it a client could take what it has for the whole answer."""
    with start(front, "cut") as client:
        got = b""
        while piece := client.recv(65536):
            got += piece
    assert b"data: 1" in got and b'data: {"error"' in got and b"0\r\n\r\n" not in got


# --- streams and clients that go away ----------------------------------------------------------------------------------------------------------


def start(front: Running, path: str) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", front.port), timeout=20)
    client.sendall(f"POST /completion?{path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode())
    return client


def test_a_stream_is_passed_on_as_it_comes(front: Running) -> None:
    with start(front, "stream") as client:
        got = client.recv(65536)
        while b"data: 1" not in got:
            got += client.recv(65536)
        assert b"chunked" in got and b"DONE" not in got
        FakeHandler.go_on.set()
        while not got.endswith(b"0\r\n\r\n"):
            got += client.recv(65536)
    assert got.count(b"data: ") == 2001


@pytest.mark.parametrize("path", ["slow", "stream"])
def test_a_client_that_goes_away_ends_the_work(front: Running, path: str) -> None:
    with start(front, path) as client:
        if path == "stream":
            while b"data: 1" not in client.recv(65536):
                pass
        else:
            wait_until(lambda: bool(FakeHandler.seen))
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
    with start(front, "stream") as client:
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
    with start(front, "stream") as client:
        while b"data: 1" not in client.recv(65536):
            pass
        assert not front.gateway.drain(0.2)


# --- clients that do not do their part ---------------------------------------------------------------------------------------------------------


def connect(front: Running, data: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", front.port), timeout=20)
    client.sendall(data)
    return client


HEAD = b"POST /completion HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize("data", [b"", b"GET / HT", HEAD, b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_idle_connections_are_closed(front: Running, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 0.3)
    with connect(front, data) as client:
        while client.recv(65536):
            pass


def test_half_a_body_is_not_waited_for(front: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "PIECE_S", 0.3)
    with connect(front, HEAD + b"Content-Length: 9\r\n\r\n{") as client:
        status, body = received(client)
    assert status == 408 and b"in time" in body and FakeHandler.seen == []


def test_a_client_that_does_not_read_is_given_up(front: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 0.5)
    with connect(front) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(b"POST /completion?flood HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        assert FakeHandler.closed.wait(20)


def test_idle_connections_make_room_for_others(front: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_OF_ONE", 8)
    clients = [connect(front, HEAD) for _ in range(30)]
    try:
        assert front.send("/health")[0] == 200
        assert sum(is_open(client) for client in clients) <= 8
    finally:
        for client in clients:
            client.close()


def test_busy_connections_are_not_thrown_out(front: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_OF_ONE", 2)
    clients = [start(front, "stream") for _ in range(2)]
    for client in clients:
        while b"data: 1" not in client.recv(65536):
            pass
    assert "too many connections" in message(front.send("/health"), 503)
    FakeHandler.go_on.set()
    for client in clients:
        while not client.recv(65536).endswith(b"0\r\n\r\n"):
            pass
        client.close()


def is_open(client: socket.socket) -> bool:
    client.settimeout(0.2)
    try:
        return client.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


@pytest.mark.parametrize("front", [["key"]], indirect=True)
@pytest.mark.parametrize("line, status", [(b"POST /completion", 401), (b"GET /props", 200), (b"DELETE /v1/stream", 401)])
def test_bodies_that_nobody_asked_for_are_not_kept(front: Running, line: bytes, status: int) -> None:
    """The answer comes while the body is on its way, which is then let go of; the next request on the connection is answered."""
    size = 64 << 20
    with connect(front, line + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size) as client:
        assert received(client)[0] == status
        before = memory()
        for _ in range(size >> 20):
            client.sendall(bytes(1 << 20))
        assert memory() - before < 16 << 20
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert received(client)[0] == 200


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if Path("/proc/self/statm").exists() else 0


def test_a_half_sent_request_does_not_delay_the_end(front: Running) -> None:
    with connect(front, b"GET /x HTTP/1.1\r\nHo"), connect(front, HEAD + b"Content-Length: 9\r\n\r\n{"), connect(front):
        assert front.send("/health")[0] == 200
        began = time.monotonic()
        front.gateway.drain(30)
        assert time.monotonic() - began < gateway.PIECE_S - 5


# --- command line ------------------------------------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "keys").write_text("# ours\n\nk1\nk2\n")
    options = args.parse(["m.gguf", "--api-key-file", str(tmp_path / "keys"), "--api-key", "k0", "-ngl", "99", "--hot", "512", "-fa", "on"], {})
    assert (options.model, options.api_keys, options.n_hot, options.rest) == (Path("m.gguf"), ["k0", "k1", "k2"], 512, ["-ngl", "99", "-fa", "on"])
    env = {"LLAMA_ARG_MODEL": "e.gguf", "LLAMA_API_KEY": "secret", "LLAMA_ARG_HOT": "7", "LLAMA_KVCAPSULE": "c.gguf", "LLAMA_ARG_PORT": "9"}
    options = args.parse([], env)
    assert (options.model, options.api_keys, options.n_hot, options.capsule, options.port) == (Path("e.gguf"), ["secret"], 7, "c.gguf", 9)
    for bad in ([], ["m.gguf", "--api-key", ""], ["m.gguf", "--api-key", ", "], ["m.gguf", "--api-prefix", "/x"], ["m.gguf", "--media-path=/"], ["m.gguf", "-m", "n.gguf"], ["m.gguf", "-hf", "u/r"], ["m.gguf", "--port", "x"], ["m.gguf", "--port", "65536"], ["m.gguf", "--max-megapixels", "inf"], ["m.gguf", "--drain", "nan"], ["m.gguf", "--max-body-mib", "0"], ["m.gguf", "--api-key-file", "/no"]):
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
