"""What llama-server takes by POST, and where in each request a picture or a sound may stand. What is not listed here is not passed on.

The places are those that llama-server reads (server-chat.cpp, server-common.cpp): the same keys anywhere else, in tool inputs, documents, metadata and
schemas, are left alone. Each picture is put back in the one form that cannot be read in two ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from .errors import RequestError


@dataclass(frozen=True)
class Media:
    """text: what the client gave (a URL or base64); put: replaces it, by a URL where `by_url`, else by base64."""

    text: str
    put: Callable[[str], None]
    sound: bool = False
    by_url: bool = False


Request = dict[str, Any]
Finder = Callable[[Request], Iterator[Media]]


def finder(path: str) -> Finder:
    """How media are found in a POST to `path` (without the query). Raises RequestError."""
    if path.endswith("/audio/transcriptions"):
        raise RequestError(501, "transcriptions are not taken here")
    found = ENDPOINTS.get(path) or (_nothing if re.fullmatch(r"/slots/\d+", path) else None)
    if found is None:
        raise RequestError(404, f"{path} is not known here")
    return found


def _chat(request: Request) -> Iterator[Media]:
    for message in _objects(request.get("messages")):
        yield from _parts(message.get("content"))


def _parts(content: Any) -> Iterator[Media]:
    """OpenAI's content parts."""
    for part in _objects(content):
        kind = part.get("type")
        if kind == "image_url":
            yield Media(_text(part.get("image_url"), "url"), partial(_put, part, "image_url", lambda url: {"url": url}), by_url=True)
        elif kind == "input_audio":
            yield Media(_text(part.get("input_audio"), "data", "url"), partial(_put, part, "input_audio", lambda data: {"data": data, "format": "wav"}), sound=True)
        elif kind in ("input_video", "video_url"):
            raise RequestError(400, "videos are not taken here: send single pictures")


def _responses(request: Request) -> Iterator[Media]:
    for item in _objects(request.get("input")):
        for part in (*_objects(item.get("content")), *_objects(item.get("output"))):
            if part.get("type") == "input_image":
                yield Media(_text(part.get("image_url"), "url"), partial(_put, part, "image_url", str), by_url=True)


def _messages(request: Request) -> Iterator[Media]:
    """Anthropic's."""
    for message in _objects(request.get("messages")):
        for block in _objects(message.get("content")):
            for inner in (block, *(_objects(block.get("content")) if block.get("type") == "tool_result" else [])):
                if inner.get("type") == "image":
                    source = inner.get("source")
                    kind = source.get("type") if isinstance(source, dict) else None
                    text = _text(source, "url" if kind == "url" else "data")
                    yield Media(text, partial(_put, inner, "source", lambda url: {"type": "url", "url": url}), by_url=True)


def _prompts(prompts: Any) -> Iterator[Media]:
    """llama.cpp's: text, tokens, {prompt_string, multimodal_data}, or a list of those."""
    for prompt in _objects(prompts if isinstance(prompts, list) else [prompts]):
        if prompt.get("multimodal_data") is not None:
            data = prompt["multimodal_data"]
            entries = list(data.values()) if isinstance(data, dict) else data if isinstance(data, list) else [data]
            prompt["multimodal_data"] = entries
            for n, entry in enumerate(entries):
                yield Media(_text(entry), partial(_put, entries, n, str))


def _completions(request: Request) -> Iterator[Media]:
    yield from _prompts(request.get("prompt"))


def _embeddings(request: Request) -> Iterator[Media]:
    for name in ("input", "content"):
        value = request.get(name)
        yield from _prompts(value)
        for prompt in _objects(value if isinstance(value, list) else [value]):
            yield from _parts(prompt.get("content"))


def _nothing(request: Request) -> Iterator[Media]:
    yield from ()


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    return (item for item in value if isinstance(item, dict)) if isinstance(value, list) else iter(())


def _text(value: Any, *keys: str) -> str:
    """A string, or the first string under `keys` of an object. Raises RequestError."""
    for found in (value, *(value.get(key) for key in keys if isinstance(value, dict))):
        if isinstance(found, str):
            return found
    raise RequestError(400, "a picture or sound must be given as base64, or as a data: URL")


def _put(holder: Any, key: Any, form: Callable[[str], Any], data: str) -> None:
    holder[key] = form(data)


ENDPOINTS: dict[str, Finder] = {
    **dict.fromkeys(("/chat/completions", "/v1/chat/completions", "/chat/completions/input_tokens", "/v1/chat/completions/input_tokens", "/apply-template"), _chat),
    **dict.fromkeys(("/responses", "/v1/responses", "/responses/input_tokens", "/v1/responses/input_tokens"), _responses),
    **dict.fromkeys(("/v1/messages", "/v1/messages/count_tokens"), _messages),
    **dict.fromkeys(("/completion", "/completions", "/v1/completions"), _completions),
    **dict.fromkeys(("/embedding", "/embeddings", "/v1/embeddings"), _embeddings),
    **dict.fromkeys(
        ("/infill", "/rerank", "/reranking", "/v1/rerank", "/v1/reranking", "/tokenize", "/detokenize", "/v1/chat/completions/control", "/lora-adapters", "/props", "/tools", "/v1/streams/lookup"),
        _nothing,
    ),
}
