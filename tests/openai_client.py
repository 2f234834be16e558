"""What the official openai client gets from a server: data-URL pictures, several of them, streams, usage, errors."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import openai
import pytest


def client(port: int, key: str = "sk-x") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=120)


def messages(text: str, *pictures: Path) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(p.read_bytes()).decode()}} for p in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def check(api: openai.OpenAI, pictures: list[Path], tokens: int) -> list[str]:
    """Asks in all ways; returns the answers about each picture. tokens: of one picture."""
    options: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    answers = []
    for picture in pictures:
        reply = api.chat.completions.create(messages=messages("what?", picture), **options)
        text, usage = reply.choices[0].message.content or "", reply.usage
        assert reply.object == "chat.completion" and reply.choices[0].finish_reason == "length" and text
        assert usage is not None and usage.completion_tokens == 8 and usage.total_tokens == usage.prompt_tokens + 8
        assert tokens < usage.prompt_tokens < 2 * tokens
        pieces = list(api.chat.completions.create(messages=messages("what?", picture), stream=True, **options))
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
        assert len([piece for piece in pieces if piece.choices and piece.choices[0].delta.content]) > 1
        answers.append(text)
    both = api.chat.completions.create(messages=messages("both?", *pictures), **options)
    assert both.usage is not None and both.usage.prompt_tokens > len(pictures) * tokens
    assert api.models.list().data
    return answers


def check_key(port: int) -> None:
    with pytest.raises(openai.AuthenticationError):
        client(port, "sk-wrong").models.list()
