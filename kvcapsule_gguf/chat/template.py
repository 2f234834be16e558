"""The chat template of the model, rendered in Jinja's sandbox, with what transformers adds to Jinja for such templates."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..runtime.errors import KVCapsuleError

Message = dict[str, str]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class _Generation(Extension):
    """{% generation %} marks, for training, what the model says: here nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)


_JINJA = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
_JINJA.filters["tojson"] = _json
_JINJA.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}


class ChatTemplate:
    """source: Jinja, None = ChatML, as llama.cpp does for models without a template; adds_bos: the tokenizer puts the first token itself."""

    def __init__(self, source: str | None, bos: str, eos: str, adds_bos: bool = True) -> None:
        self._prefix = bos if adds_bos else ""
        self._typed = False
        try:
            self._template = _JINJA.from_string(source or CHATML, {"bos_token": bos, "eos_token": eos})
        except Exception as error:
            raise KVCapsuleError(f"the model's chat template cannot be read: {_line(error)}") from error

    def render(self, messages: list[Message], generate: bool) -> str:
        """The conversation as text; generate: it ends with a question, and the start of an answer follows. Raises KVCapsuleError."""
        if not generate:
            return self._render(messages, False)
        question = messages[-1]["content"].strip()
        text = self._render(messages, True)
        if question not in text:
            # some templates only know content that is a list of parts
            self._typed = not self._typed
            text = self._render(messages, True)
        if question not in text:
            raise KVCapsuleError("the model's chat template drops the message")
        return text

    def _render(self, messages: list[Any], generate: bool) -> str:
        if self._typed:
            messages = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            text = self._template.render(messages=messages, add_generation_prompt=generate, functions=None, function_call=None, tools=None, tool_choice=None)
        # a template is a program of the model's maker
        except Exception as error:
            raise KVCapsuleError(f"the model's chat template refuses this conversation: {_line(error)}") from error
        return text.removeprefix(self._prefix)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
