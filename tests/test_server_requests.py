"""What kvcapsule-server reads in a request before llama-server does: every place where pictures may stand, costs of grammars and numbers, addresses that are not asked."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import tempfile
import threading
import wave
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from PIL import Image

from kvcapsule_gguf.runtime import pictures
from kvcapsule_gguf.server import remote
from kvcapsule_gguf.server.body import parse, written
from kvcapsule_gguf.server.caps import check_caps
from kvcapsule_gguf.server.endpoints import ENDPOINTS, finder
from kvcapsule_gguf.server.errors import RequestError
from kvcapsule_gguf.server.grammar import check_grammar, check_schemas
from kvcapsule_gguf.server.media import Limits, prepare

LIMITS = Limits(1 << 20, pictures.Limits(1 << 20, 1_000_000, 3_000_000, 16), remote_images=False)
CHAT, RESPONSES, MESSAGES, COMPLETION, EMBEDDINGS = "/v1/chat/completions", "/v1/responses", "/v1/messages", "/completion", "/v1/embeddings"


def chat(part: Any, role: str = "user") -> Any:
    return {"messages": [{"role": role, "content": [part]}]}


# every shape that llama-server takes a picture from, {} standing for it
PLACES = [
    (CHAT, lambda u: chat({"type": "image_url", "image_url": {"url": u}})),
    (CHAT, lambda u: chat({"type": "image_url", "image_url": u})),
    (CHAT, lambda u: chat({"type": "image_url", "image_url": {"url": u, "detail": "high"}}, "system")),
    (CHAT, lambda u: chat({"type": "image_url", "image_url": {"url": u}, "text": "x"}, "tool")),
    ("/chat/completions/input_tokens", lambda u: chat({"type": "image_url", "image_url": {"url": u}})),
    ("/apply-template", lambda u: chat({"type": "image_url", "image_url": {"url": u}})),
    (RESPONSES, lambda u: {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": u}]}]}),
    (RESPONSES, lambda u: {"input": [{"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image", "image_url": u}]}]}),
    ("/responses/input_tokens", lambda u: {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": {"url": u}}]}]}),
    (MESSAGES, lambda u: chat({"type": "image", "source": {"type": "url", "url": u}})),
    (MESSAGES, lambda u: chat({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": u}})),
    ("/v1/messages/count_tokens", lambda u: chat({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": {"type": "base64", "data": u}}]})),
    (COMPLETION, lambda u: {"prompt": {"prompt_string": "x", "multimodal_data": [u]}}),
    (COMPLETION, lambda u: {"prompt": {"prompt_string": "x", "multimodal_data": {"a": u}}}),
    (COMPLETION, lambda u: {"prompt": {"prompt_string": "x", "multimodal_data": u}}),
    ("/completions", lambda u: {"prompt": ["y", {"prompt_string": "x", "multimodal_data": [u]}]}),
    (EMBEDDINGS, lambda u: {"input": {"prompt_string": "x", "multimodal_data": {"a": u}}}),
    (EMBEDDINGS, lambda u: {"input": ["y", {"content": [{"type": "image_url", "image_url": {"url": u}}]}]}),
    ("/embedding", lambda u: {"content": {"content": [{"type": "image_url", "image_url": {"url": u}}]}}),
]


def picture(size: tuple[int, int] = (8, 6)) -> str:
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, "BMP")
    return base64.b64encode(data.getvalue()).decode()


def prepared(path: str, request: Any) -> tuple[int, Any]:
    """How many media were found, and the request as it goes on, with the contents of files, in base64, for their names."""
    media = list(finder(path)(request))
    made: list[Path] = []
    with tempfile.TemporaryDirectory() as folder:
        prepare([(medium, None) for medium in media], LIMITS, Path(folder), made, lambda line: None)
        text = written(request).decode()
        for file in made:
            assert text.count(f"file://{file.name}") == 1 and file.parent == Path(folder)
            text = text.replace(f"file://{file.name}", base64.b64encode(file.read_bytes()).decode())
    return len(media), json.loads(text)


@pytest.mark.parametrize("path, request_of", PLACES)
def test_pictures_are_found_wherever_llama_server_reads_them(path: str, request_of: Any) -> None:
    bmp = picture()
    found, request = prepared(path, request_of(bmp))
    text = json.dumps(request)
    pixels = base64.b64encode(b"P6 8 6 255\n" + b"\xff\0\0" * 48).decode()
    # in a file, or, where no URL is taken, what every PNG begins with
    assert found == 1 and bmp not in text and ("iVBORw0KGgo" if path in (COMPLETION, "/completions") or "multimodal_data" in text else pixels) in text
    again, same = prepared(path, json.loads(text))
    assert again == 1 and same == request  # and the new form is one that is found as well
    for bad in (base64.b64encode(b"hello").decode(), "file:///etc/passwd", "ftp://x/y", picture((1001, 1000))):
        with pytest.raises(RequestError):
            prepared(path, request_of(bad))


def test_every_endpoint_that_takes_pictures_is_tried_above() -> None:
    tried = {ENDPOINTS[path] for path, _ in PLACES}
    assert set(ENDPOINTS.values()) - tried == {ENDPOINTS["/tokenize"]}


@pytest.mark.parametrize(
    "path, request_",
    [
        (MESSAGES, {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "edit_image", "input": {"image_url": "https://example.org/a.png"}}]}]}),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "hello world"}}]}]}),
        (MESSAGES, {"messages": [{"role": "user", "content": "hello"}], "metadata": {"source": {"type": "url", "url": "https://x"}}}),
        (CHAT, {"messages": [], "metadata": {"image_url": "https://example.org/a.png"}}),
        (CHAT, {"messages": [], "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "image_url", "image_url": "x", "example": {"image_url": "https://a"}}}}}}]}),
        (CHAT, chat({"type": "text", "text": "x", "image_url": {"url": "https://example.org/a.png"}})),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"image_url": "a.png"}'}}]}]}),
        (COMPLETION, {"prompt": "image_url", "messages": [{"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        ("/tokenize", {"content": "x", "multimodal_data": ["x"]}),
    ],
)
def test_the_same_words_elsewhere_are_left_alone(path: str, request_: Any) -> None:
    before = json.loads(json.dumps(request_))
    assert prepared(path, request_) == (0, before)


@pytest.mark.parametrize("kind", ["input_video", "video_url"])
@pytest.mark.parametrize("data", [{"data": "AAAA"}, {"url": "http://x/y"}, "x"])
def test_videos_are_refused(kind: str, data: Any) -> None:
    with pytest.raises(RequestError, match="videos"):
        prepared(CHAT, chat({"type": kind, kind: data}))
    with pytest.raises(RequestError, match="videos"):
        prepared(EMBEDDINGS, {"input": {"content": [{"type": kind, kind: data}]}})


def wav(rate: int = 16_000, seconds: float = 0.1, channels: int = 1) -> str:
    out = io.BytesIO()
    with wave.open(out, "wb") as sound:
        sound.setparams((channels, 2, rate, 0, "NONE", ""))
        sound.writeframes(bytes(2 * channels * int(rate * seconds)))
    return base64.b64encode(out.getvalue()).decode()


def test_sounds_are_plain_samples() -> None:
    """A null under `data` lets llama-server look under `url`."""
    for given in ({"data": wav(), "format": "mp3"}, {"data": None, "url": "data:audio/wav;base64," + wav()}, {"url": wav()}):
        assert prepared(CHAT, chat({"type": "input_audio", "input_audio": given})) == (1, chat({"type": "input_audio", "input_audio": {"data": wav(), "format": "wav"}}))
    for bad in (picture(), base64.b64encode(b"fLaC" + bytes(99)).decode(), base64.b64encode(b"ID3" + bytes(99)).decode(), wav(rate=1, seconds=100), wav(channels=8)):
        with pytest.raises(RequestError):
            prepared(CHAT, chat({"type": "input_audio", "input_audio": {"data": bad}}))


# --- what a request may cost -------------------------------------------------------------------------------------------------------------------

JSON_GBNF = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}   # a comment with ( in it
"""
UUID = 'root ::= "{" [0-9a-f]{8} ("-" [0-9a-f]{4}){3} "-" [0-9a-f]{12} "}"'


@pytest.mark.parametrize("grammar", [JSON_GBNF, UUID, 'root ::= "yes" | "no"', 'root ::= (("a" | "b")+ " "?){1,50} "."', "root ::= [^\\]]{0,2000}", 'root ::= <think> !<x>* "()"'])
def test_grammars_that_people_use_pass(grammar: str) -> None:
    check_grammar(grammar)


def test_llama_cpps_own_grammars_pass() -> None:
    found = list((ROOT / ".cache").glob("llama.cpp-*/stock/source/grammars/*.gbnf"))
    if not found:
        pytest.skip("no source of llama.cpp here")
    for path in found:
        check_grammar(path.read_text())


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000,
        'root ::= (((((((("a"?){9}){9}){9}){9}){9}){9}){9})',
        'root ::= ((((((("a"{0,9}){0,9}){0,9}){0,9}){0,9}){0,9}))',
        'root ::= "x" a{99}\na ::= b{99}\nb ::= c{99}\nc ::= "a"?',
        "root ::= " + " ".join(f"r{n}" for n in range(40)) + "\n" + "\n".join(f"r{n} ::= | s s s s s s" for n in range(40)) + '\ns ::= t t t t t t\nt ::= "a" | ""',
        'root ::= "a"{2000} ' * 99,
        'root ::= "a"{99999999999999999999}',
        'root ::= "' + "a" * 300_000 + '"',
        "root ::= " + "[" * 200_000,
        'root ::= "a" {',
        'root ::= "a"{1,' + " " * 200_000,
    ],
)
def test_grammars_that_end_llama_server_are_refused(grammar: str) -> None:
    with pytest.raises(RequestError, match="grammar"):
        check_grammar(grammar)


def deep(levels: int) -> Any:
    return {"type": "array", "items": deep(levels - 1)} if levels else {"type": "string"}


def test_schemas() -> None:
    for good in ({"type": "object", "properties": {"d": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}(T[0-9:]+(\.\d+)?Z?)?$", "maxLength": 2000}}}, deep(20), {"enum": ["("] * 999}):
        check_schemas([good])
    for bad in (deep(100), {"pattern": "^(((((((a?){9}){9}){9}){9}){9}){9})$"}, {"pattern": "(" * 999}, {"pattern": "[" * 200_000}, {"enum": ["x" * 300_000]}, {"anyOf": [{"type": "string", "maxLength": 2000}] * 99},
                {"anyOf": [{"pattern": "[" * 4096}] * 60}, {"type": "string", "maxLength": 1e9}, {"anyOf": [{"maxLength": 10**9}, {"minLength": -(10**9)}]}):  # fmt: skip
        with pytest.raises(RequestError):
            check_schemas([bad])


@pytest.mark.parametrize("schema", [{"enum": ["x" * 10_000]}, {"anyOf": [{"type": "string", "maxLength": 2000}] * 2}, {"pattern": "^([0-9]{1,999}-){3}[a-f]{900}$"}], ids=["characters", "lengths", "patterns"])
def test_the_schemas_of_a_request_share_one_budget(schema: Any) -> None:
    """Each of these costs a small part of it, whatever place it stands in; so many tools of real clients cost nearly nothing."""
    tools = [{"type": "function", "function": {"name": f"t{n}", "parameters": schema}} for n in range(60)]
    check_caps({"tools": tools[:10], "response_format": {"json_schema": {"schema": schema}}})
    for request in ({"tools": tools}, {"tools": [{"input_schema": schema} for _ in tools]}):
        with pytest.raises(RequestError, match="schemas"):
            check_caps(request)
    usual = {"type": "object", "properties": {name: {"type": "string", "maxLength": 200, "description": "what it is " * 9} for name in "abcdef"}}
    check_caps({"tools": [{"function": {"parameters": usual}}] * 60})


@pytest.mark.parametrize(
    "request_",
    [
        {"dry_penalty_last_n": 2**31 - 1}, {"repeat_last_n": 1e9}, {"n_probs": 101}, {"logprobs": 2**31}, {"top_logprobs": 101}, {"stop": ["a"] * 65}, {"stop": "a" * 70_000}, {"stop_sequences": ["a"] * 65},
        {"samplers": ["top_k"] * 65}, {"dry_sequence_breakers": ["a" * 70_000]}, {"logit_bias": {str(n): 1 for n in range(5000)}}, {"grammar_triggers": []}, {"chat_parser": "{}"}, {"prompt": ["x"] * 3000},
        {"grammar": "(" * 99}, {"json_schema": deep(99)}, {"response_format": {"type": "json_object", "schema": deep(99)}}, {"response_format": {"json_schema": {"schema": deep(99)}}},
        {"text": {"format": {"schema": deep(99)}}}, {"tools": [{"function": {"parameters": deep(99)}}]}, {"tools": [{"parameters": deep(99)}]}, {"tools": [{"input_schema": deep(99)}]},
    ],
)  # fmt: skip
def test_caps(request_: Any) -> None:
    with pytest.raises(RequestError):
        check_caps(request_)


def test_what_clients_usually_say_is_below_the_caps() -> None:
    check_caps({"prompt": list(range(10_000)), "stop": ["a", "b"], "logprobs": True, "top_logprobs": 20, "repeat_last_n": 64, "tools": None, "response_format": None, "logit_bias": None, "grammar": "", "stream": True, "text": "x"})


def test_lists_that_cost_far_more_than_their_bytes() -> None:
    with pytest.raises(RequestError, match="values"):
        parse(b'{"x": [' + b"[]," * 500_000 + b"[]]}")
    assert parse(b'{"x": "' + b"A" * 3_000_000 + b'"}')


# --- pictures on other servers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
     "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "::127.0.0.1"],
)  # fmt: skip
def test_addresses_of_this_network_are_not_public(address: str) -> None:
    assert not remote.is_public(address)


def test_public_addresses() -> None:
    assert remote.is_public("93.184.215.14") and remote.is_public("2606:2800:21f:cb07:6820:80da:af6b:8b2c") and remote.is_public("::ffff:93.184.215.14")


class Site(BaseHTTPRequestHandler):
    asked: list[tuple[str, str]] = []

    def do_GET(self) -> None:
        type(self).asked.append((self.headers["Host"], self.path))
        self.send_response(302 if self.path.startswith("/to?") else 304 if self.path == "/nowhere" else 200)
        if self.path != "/nowhere":
            self.send_header("Location", self.path[4:])
        self.end_headers()
        self.wfile.write(b"x" * (2000 if self.path == "/large" else 10))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    Site.asked.clear()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_nothing_inside_is_asked(site: int) -> None:
    """127.0.0.1 in many spellings; all of them arrive at the look-up of names."""
    for host in ("127.0.0.1", "localhost", "2130706433", "0x7f000001", "127.1", "[::ffff:127.0.0.1]", "u:p@127.0.0.1"):
        with pytest.raises(RequestError, match="public|fetched"):
            asyncio.run(remote.fetch(f"http://{host}:{site}/x.png", 1000, lambda size: None))
    assert Site.asked == []


def test_what_is_public_is_asked_by_the_address_that_was_checked(site: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are looked up once for each request, and each redirect is checked as the first one was."""
    looked_up: list[str] = []
    held: list[int] = []

    async def look_up(self: Any, host: str, port: int, **_: Any) -> Any:
        looked_up.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1" if host in ("good.example", "127.0.0.1") else "10.0.0.1", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", look_up)
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1")
    get = lambda path, most=1000: asyncio.run(remote.fetch(f"http://good.example:{site}{path}", most, held.append))  # noqa: E731
    assert get("/x") == b"x" * 10 and Site.asked == [(f"good.example:{site}", "/x")] and sum(held) == 10
    assert get("/to?/y") == b"x" * 10
    for path, words in ((f"/to?http://inside.example:{site}/", "public"), ("/to?file:///etc/passwd", "http"), ("/to?/to?/to?/to?/to?/x", "redirects"), ("/nowhere", "304")):
        with pytest.raises(RequestError, match=words):
            get(path)
    with pytest.raises(RequestError, match="MiB"):
        get("/large")
    assert all(host == f"good.example:{site}" for host, _ in Site.asked) and "inside.example" in looked_up
