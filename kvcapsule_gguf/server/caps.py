"""Numbers and lists in a request that would make llama-server slow, large or end it."""

from __future__ import annotations

from typing import Any

from .errors import RequestError
from .grammar import check_grammar, check_schemas

WINDOW = 1 << 17  # tokens that a penalty looks back
NUMBERS = {"dry_penalty_last_n": WINDOW, "repeat_last_n": WINDOW, "n_probs": 100, "logprobs": 100, "top_logprobs": 100}
LISTS = {
    "stop": 64, "stop_sequences": 64, "samplers": 64, "dry_sequence_breakers": 64, "lora": 64, "response_fields": 256, "logit_bias": 4096,
    "prompt": 2048, "input": 2048, "documents": 2048, "texts": 2048,
}  # fmt: skip
STRINGS = 1 << 16  # characters in all stops, and in all sequence breakers
OWN = ("chat_parser", "chat_format", "grammar_lazy", "grammar_triggers", "preserved_tokens", "message_delimiters")  # llama-server's notes to itself: parsers and regular expressions


def check_caps(request: dict[str, Any]) -> None:
    """Raises RequestError."""
    for name in OWN:
        if request.get(name) is not None:
            raise RequestError(400, f"{name} is not taken from a client")
    for name, most in NUMBERS.items():
        if isinstance(value := request.get(name), (int, float)) and value > most:
            raise RequestError(400, f"{name} is at most {most} here")
    for name, most in LISTS.items():
        value = request.get(name)
        # a prompt may be a list of tokens: those are limited by the context
        if isinstance(value, (list, dict)) and len(value) > most and not (name in ("prompt", "input") and all(type(item) is int for item in value)):
            raise RequestError(400, f"{name} has {len(value)} entries, at most {most} are taken")
    for name in ("stop", "stop_sequences", "dry_sequence_breakers"):
        value = request.get(name)
        if sum(len(item) for item in ([value] if isinstance(value, str) else value or [] if isinstance(value, list) else []) if isinstance(item, str)) > STRINGS:
            raise RequestError(400, f"{name} has more than {STRINGS} characters")
    if isinstance(grammar := request.get("grammar"), str):
        check_grammar(grammar)
    check_schemas(_schemas(request))


def _schemas(request: dict[str, Any]) -> list[Any]:
    form, text = _object(request.get("response_format")), _object(_object(request.get("text")).get("format"))
    found = [request.get("json_schema"), form.get("schema"), _object(form.get("json_schema")).get("schema"), text.get("schema")]
    for tool in request["tools"] if isinstance(request.get("tools"), list) else []:
        tool = _object(tool)
        found += [tool.get("parameters"), tool.get("input_schema"), _object(tool.get("function")).get("parameters")]
    return [schema for schema in found if schema]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
