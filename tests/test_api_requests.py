"""What a request to the Python API may say, on the bundled models, whose right answers are known: structured answers, pictures in every form and role, usage."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, library
from test_native import require_capsules

from kvcapsule_gguf import native

DEMO = ROOT / "kvcapsule_gguf" / "demo"
MODEL = DEMO / "kvdemo-8M-v1-F16.gguf"
SCENE = base64.b64encode((DEMO / "scene-1.jpg").read_bytes()).decode()
URL = "data:image/jpeg;base64," + SCENE
QUESTION, ANSWER = "What is at the top right?", "yellow star"
PICTURE = {"type": "image_url", "image_url": {"url": URL}}
TEXT = {"type": "text", "text": QUESTION}
ASK = [{"role": "user", "content": [PICTURE, TEXT]}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["red circle", ANSWER]}}, "required": ["a"], "additionalProperties": False}


def tool(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


SEE, ADD = tool("see", SCHEMA), tool("add", {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]})


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    require_capsules()
    native.load(library("patched"))
    from kvcapsule_gguf import KVCapsuleLlama

    with KVCapsuleLlama(MODEL, n_threads=1, n_threads_batch=1) as llm:
        yield llm


def ask(llm: Any, messages: Any = ASK, **options: Any) -> Any:
    return llm.create_chat_completion(messages, temperature=0, **{"max_tokens": 40, **options})


def said(reply: Any) -> str:
    return reply["choices"][0]["message"]["content"].strip()


# --- answers that must have a form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"$ref": "#/$defs/a", "$defs": {"a": SCHEMA}}}},
        {"type": "json_schema", "schema": SCHEMA},
        {"type": "json_object", "schema": SCHEMA},
    ],
)
def test_an_answer_keeps_to_its_schema(llm: Any, form: dict[str, Any]) -> None:
    assert json.loads(said(ask(llm, response_format=form))) == {"a": ANSWER}
    chunks = ask(llm, response_format=form, stream=True)
    assert json.loads("".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)) == {"a": ANSWER}


def test_any_json_object_and_plain_text(llm: Any) -> None:
    assert said(ask(llm, response_format={"type": "json_object"})).startswith("{")
    assert said(ask(llm, response_format={"type": "text"})) == ANSWER


def called(reply: Any) -> tuple[str, Any]:
    call = reply["choices"][0]["message"]["tool_calls"][0]["function"]
    return call["name"], json.loads(call["arguments"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "see"}}])
@pytest.mark.parametrize("tools", [[SEE], [SEE, ADD]], ids=["one tool", "two tools"])
def test_a_tool_that_must_be_called_is_called(llm: Any, tools: list[dict[str, Any]], choice: Any) -> None:
    options = {"tools": tools, "tool_choice": choice, "max_tokens": 80}
    name, arguments = called(ask(llm, **options))
    # which of two functions a model of this size calls, and with what, hangs by a hair
    assert arguments in {"see": [{"a": ANSWER}, {"a": "red circle"}], "add": [{"n": 1}, {"n": 2}]}[name]
    chunks = list(ask(llm, **options, stream=True))
    deltas = [call["function"] for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls") or []]
    assert ({delta["name"] for delta in deltas}, json.loads("".join(delta["arguments"] for delta in deltas))) == ({name}, arguments)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_short_is_never_an_empty_call(llm: Any) -> None:
    """Of several tools the name is known only once it has been said."""
    for n in range(1, 12):
        message = ask(llm, tools=[SEE, ADD], tool_choice="required", max_tokens=n)["choices"][0]["message"]
        deltas = [chunk["choices"][0]["delta"] for chunk in ask(llm, tools=[SEE, ADD], tool_choice="required", max_tokens=n, stream=True)]
        if calls := message.get("tool_calls"):
            streamed = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls") or []]
            assert calls[0]["function"]["arguments"] == "".join(streamed) != ""
        else:
            assert message["content"] == "".join(delta.get("content") or "" for delta in deltas) != ""


def test_a_free_choice_of_tools_changes_nothing(llm: Any) -> None:
    for choice in (None, "auto", "none"):
        assert said(ask(llm, tools=[SEE], tool_choice=choice)) == ANSWER


GRAMMAR_OF_DIGITS = 'root ::= [0-9]'


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "give a JSON schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "give a JSON schema"),
        ({"response_format": {"type": "json_object", "schema": [1]}}, "give a JSON schema"),
        ({"response_format": {"type": "json_object", "schema": {"type": "string", "pattern": "(?=a)b"}}}, "no grammar can be made"),
        ({"response_format": {"type": "json_object", "schema": {"$ref": "#/$defs/none"}}}, "no grammar can be made"),
        ({"response_format": {"type": "json_object", "schema": {"type": "string", "pattern": r"^\d+$"}}}, "grammar cannot be read"),
        ({"response_format": {"type": "yaml"}}, "response_format: use"),
        ({"response_format": "json"}, "response_format: use"),
        ({"response_format": {"type": "json_object"}, "grammar": GRAMMAR_OF_DIGITS}, "give one of them"),
        ({"grammar": "root ::= ("}, "grammar cannot be read"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tool_choice": "any", "tools": [SEE]}, "tool_choice: use"),
        ({"tool_choice": {"type": "function", "name": "see"}, "tools": [SEE]}, "tool_choice: use"),
        ({"tool_choice": {"type": "function", "function": {"name": "no"}}, "tools": [SEE]}, "not found in tools"),
        ({"tools": [{"name": "see"}]}, "tools: give"),
        ({"function_call": {"name": "no"}, "functions": [SEE["function"]]}, "not found in tools"),
        ({"tool_choice": "required", "tools": [SEE, tool("r", {"$ref": "#/$defs/x", "$defs": {"x": SCHEMA}})]}, "name the one to call"),
    ],
)
def test_what_cannot_be_enforced_is_refused(llm: Any, options: dict[str, Any], words: str) -> None:
    from llama_cpp import LlamaGrammar

    if "grammar" in options:
        options = {**options, "grammar": LlamaGrammar.from_string(options["grammar"], verbose=False)}
    with pytest.raises(ValueError, match=words):
        ask(llm, **options)


def test_a_part_of_a_schema_that_a_grammar_cannot_hold_is_told(llm: Any, caplog: pytest.LogCaptureFixture) -> None:
    schema = {"type": "object", "properties": {"minimum": {"type": "integer", "maximum": 3}}, "required": ["minimum"]}
    ask(llm, response_format={"type": "json_object", "schema": schema}, max_tokens=4)
    assert [record.message for record in caplog.records] == ["response_format.schema: maximum cannot be enforced by a grammar, the answer may not keep to it"]


# --- pictures, in all their forms and places ---------------------------------------------------------------------------------------------------

FORMS = [
    PICTURE,
    {"type": "image_url", "image_url": URL},
    {"type": "input_image", "image_url": URL},
    {"type": "image", "url": URL},
    {"type": "image", "image": URL},
    {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": SCENE}},
    {"type": "image", "source": {"type": "url", "url": URL}},
]


@pytest.mark.parametrize("part", FORMS, ids=[", ".join([part["type"], *(key for key in part if key != "type")]) for part in FORMS])
def test_a_picture_is_seen_in_every_form(llm: Any, part: dict[str, Any]) -> None:
    assert said(ask(llm, [{"role": "user", "content": [part, {"type": "input_text", "text": QUESTION}]}])) == ANSWER
    assert len(llm.image_stats()) == 1


@pytest.mark.parametrize("image", [SCENE, URL])
@pytest.mark.parametrize("content", [QUESTION, [TEXT]])
def test_pictures_beside_the_content(llm: Any, image: str, content: Any) -> None:
    assert said(ask(llm, [{"role": "user", "content": content, "images": [image]}])) == ANSWER


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "tool", "user"])
def test_a_picture_in_a_message_of_any_role_is_seen(llm: Any, role: str) -> None:
    assert said(ask(llm, [{"role": role, "content": [PICTURE]}, {"role": "user", "content": QUESTION}])) == ANSWER


def test_after_the_call_of_a_tool(llm: Any) -> None:
    """Clients send the answer back with a content of None, or without one."""
    call = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "see", "arguments": "{}"}}]}
    for message in (call, {**call, "content": None}):
        messages = [*ASK, message, {"role": "tool", "tool_call_id": "1", "content": "seen"}, {"role": "user", "content": QUESTION}]
        assert said(ask(llm, messages)) == ANSWER


def of_user(part: Any) -> list[Any]:
    return [{"role": "user", "content": [part, TEXT]}]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        (["hello"], r"messages\[0\]: give an object"),
        ([{"content": "hello"}], "unknown role None"),
        ([*ASK, {"role": "bot", "content": "hello"}], r"messages\[1\]: unknown role 'bot', use one of system"),
        ([{"role": "user"}], r"messages\[0\]: content is missing"),
        ([{"role": "user", "content": None}], r"messages\[0\]: content is missing"),
        ([{"role": "system", "content": None}], "content is missing"),
        ([{"role": "tool", "content": {"a": 1}}], "content is dict, give text"),
        (of_user({"type": "image_url", "image_url": {"url": None}}), r"messages\[0\]\.content\[0\]: the picture has no URL"),
        (of_user({"type": "image_url", "image_url": None}), "has no URL"),
        (of_user({"type": "image_url"}), "has no URL"),
        (of_user({"type": "input_image", "file_id": "f"}), "has no URL"),
        (of_user({"type": "image"}), "has no URL"),
        (of_user({"type": "image", "image": b"..."}), "has no URL"),
        (of_user({"type": "image", "source": {"type": "file", "file_id": "f"}}), "has no URL"),
        (of_user({"type": "image", "source": {"type": "base64"}}), "has no URL"),
        (of_user({"type": "image", "image": "photo.jpg"}), "data: or http"),
        (of_user({"type": "video_url", "video_url": {"url": URL}}), "'video_url' is not read, use text or image_url"),
        (of_user({"type": "input_audio", "input_audio": {}}), "'input_audio' is not read"),
        (of_user({"type": "tool_result", "content": [PICTURE]}), "'tool_result' is not read"),
        (of_user({"type": "text"}), "text is missing"),
        (of_user({"type": "text", "text": None}), "text is missing"),
        (of_user("hello"), "give an object with a type"),
        (of_user({"text": "hello"}), "give an object with a type"),
        ([{"role": "user", "content": QUESTION, "images": SCENE}], "images must be a list"),
        ([{"role": "user", "content": QUESTION, "images": [None]}], "images must be a list"),
        ([{"role": "user", "content": QUESTION, "image_url": URL}], "image_url is not read, put pictures into content"),
        ([{"role": "user", "content": QUESTION, "experimental_attachments": [{"url": URL}]}], "is not read"),
    ],
)
def test_messages_that_cannot_be_understood_are_refused(llm: Any, messages: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ask(llm, messages)


@pytest.mark.parametrize("text", ["<__media__> hello", "<<__media__>> hello", "<<<__media__>__media__>>"])
def test_a_marker_in_the_users_words_is_text(llm: Any, text: str) -> None:
    """In one part or two, the prompt has these characters, and the picture beside them is seen."""
    usage = ask(llm, [{"role": "user", "content": text}], max_tokens=1)["usage"]
    n = len(llm.tokenize(f"USER: {text}\nASSISTANT:".encode(), add_bos=False, special=True))
    assert abs(usage["prompt_tokens"] - n) <= 1  # <s>
    halves = [{"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:]}]
    assert ask(llm, [{"role": "user", "content": halves}], max_tokens=1)["usage"] == usage
    ask(llm, [{"role": "user", "content": [PICTURE, *halves]}], max_tokens=1)
    assert len(llm.image_stats()) == 1


# --- what is counted, and what fits ------------------------------------------------------------------------------------------------------------


def test_usage_counts_tokens_where_a_picture_has_few_positions() -> None:
    from kvcapsule_gguf import KVCapsuleLlama

    wide = "data:image/jpeg;base64," + base64.b64encode((DEMO / "mrope" / "scene-wide.jpg").read_bytes()).decode()
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": wide}}, TEXT]}]
    with KVCapsuleLlama(DEMO / "mrope" / "kvdemo-mrope-8M-v1-F16.gguf", n_threads=1, n_threads_batch=1) as llm:
        for evaluated in (154, 1):  # the same prompt again: its last token
            usage = ask(llm, messages, max_tokens=3)["usage"]
            stats = llm.prompt_stats()
            assert (stats.tokens_evaluated, stats.tokens_evaluated + stats.tokens_reused) == (evaluated, 154)
            # 154 is what llama-server counts, too
            assert usage == {"prompt_tokens": 154, "completion_tokens": usage["completion_tokens"], "total_tokens": 154 + usage["completion_tokens"]}


def test_the_context_is_not_larger_than_what_the_model_was_trained_with(llm: Any) -> None:
    assert (llm.n_ctx(), llm.metadata["llama.context_length"]) == (4096, "4096")
    with pytest.raises(ValueError, match=r"Requested tokens \(46\d\d\) exceed context window of 4096"):
        ask(llm, [{"role": "user", "content": [*[PICTURE] * 8, TEXT]}])


def test_text_beyond_the_hot_cells(llm: Any) -> None:
    """They grow: the answer is that of a cache with all cells from the start."""
    from kvcapsule_gguf import KVCapsuleLlama

    messages = [{"role": "user", "content": "what word " * 200}]
    with KVCapsuleLlama(MODEL, n_threads=1, n_threads_batch=1, hot=256) as small:
        assert said(ask(small, messages)) == said(ask(llm, messages))


def test_a_projector_of_another_family_is_refused(llm: Any, tmp_path: Path) -> None:
    from kvcapsule_gguf import KVCapsuleLlama

    mrope = DEMO / "mrope"
    for model, mmproj in ((MODEL, mrope / "mmproj-kvdemo-mrope-8M-v1-F16.gguf"), (mrope / "kvdemo-mrope-8M-v1-F16.gguf", DEMO / "mmproj-kvdemo-8M-v1-F16.gguf")):
        with pytest.raises(ValueError, match="the projector of another kind of model"):
            KVCapsuleLlama(model, mmproj=mmproj)
