"""The chat template of the model, rendered in llama-cpp-python's sandbox."""

from __future__ import annotations

from typing import Any

from ..runtime.errors import KVCapsuleError

Message = dict[str, str]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ChatTemplate:
    """source: Jinja, None = ChatML, as llama.cpp does for models without a template; adds_bos: the tokenizer puts the first token itself."""

    def __init__(self, source: str | None, bos: str, eos: str, adds_bos: bool = True) -> None:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        self._prefix = bos if adds_bos else ""
        self._typed = False
        try:
            self._with_prompt = Jinja2ChatFormatter(source or CHATML, eos, bos, add_generation_prompt=True)
            self._without_prompt = Jinja2ChatFormatter(source or CHATML, eos, bos, add_generation_prompt=False)
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
        formatter = self._with_prompt if generate else self._without_prompt
        try:
            text = formatter(messages=messages).prompt
        # a template is a program of the model's maker
        except Exception as error:
            raise KVCapsuleError(f"the model's chat template refuses this conversation: {_line(error)}") from error
        return text.removeprefix(self._prefix)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
