"""Answers that must have a form: JSON, a schema, the call of a tool. Each becomes a grammar, or a ValueError."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from llama_cpp import Llama, llama_cpp
from llama_cpp.llama_grammar import JSON_GBNF, LlamaGrammar

from .quiet import reasons, say

Tool = dict[str, Any]
# what the converter of llama-cpp-python leaves out of a grammar without a word
NOT_ENFORCED = frozenset(
    "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf uniqueItems contains minProperties maxProperties patternProperties propertyNames not if "
    "dependentRequired dependentSchemas unevaluatedProperties unevaluatedItems".split()
)
NAMED = ("properties", "$defs", "definitions")  # their keys are names, not keywords
CALL = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')


@dataclass
class Form:
    """grammar: None if the answer is free; tools: one of these must be called; shown: the tools that the chat template gets to see."""

    grammar: LlamaGrammar | None = None
    tools: list[Tool] = field(default_factory=list)
    shown: list[Tool] | None = None

    def split(self, text: str, complete: bool) -> tuple[str, str] | None:
        """(name, arguments) of the call that the answer is; None if it ends before the arguments. complete: the answer was not cut short."""
        if len(self.tools) == 1:
            return self.tools[0]["function"]["name"], text
        if not (match := CALL.match(text)):
            return None
        rest = text[match.end() :]
        return json.loads(match[1]), rest.rstrip().removesuffix("}").rstrip() if complete else rest


def answer_form(llama: Llama, *, functions: Any, function_call: Any, tools: Any, tool_choice: Any, response_format: Any, grammar: Any) -> Form:
    """Raises ValueError for what is not known, and for what no grammar can be made of."""
    if functions is not None:
        tools = [{"type": "function", "function": function} for function in functions]
    if function_call is not None:
        tool_choice = {"type": "function", "function": function_call} if isinstance(function_call, dict) else function_call
    tools = _tools(tools)
    form = Form(grammar, _must_call(tools, tool_choice), tools if tool_choice != "none" else None)
    text = _call_grammar(form.tools) if form.tools else _format_grammar(response_format)
    if text is not None:
        if grammar is not None:
            raise ValueError("grammar cannot be used with response_format or with a tool that must be called: give one of them")
        form.grammar = LlamaGrammar.from_string(text, verbose=False)
    if form.grammar is not None:
        _check(llama, form.grammar)
    return form


def _tools(tools: Any) -> list[Tool] | None:
    for tool in tools or []:
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(function := tool.get("function"), dict) or not isinstance(function.get("name"), str):
            raise ValueError('tools: give a list of {"type": "function", "function": {"name": ..., "parameters": ...}}')
    return list(tools) if tools else None


def _must_call(tools: list[Tool] | None, choice: Any) -> list[Tool]:
    if choice in (None, "none", "auto"):
        return []
    name = None
    if choice != "required":
        function = choice.get("function") if isinstance(choice, dict) and choice.get("type", "function") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        if name is None:
            raise ValueError('tool_choice: use "none", "auto", "required" or {"type": "function", "function": {"name": ...}}')
    found = [tool for tool in tools or [] if name in (None, tool["function"]["name"])]
    if not found:
        raise ValueError("tool_choice needs tools" if not tools else f"Tool choice '{name}' not found in tools.")
    return found


def _format_grammar(response_format: Any) -> str | None:
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema")
        return _schema_grammar(schema, "response_format.schema") if schema is not None else JSON_GBNF
    if kind == "json_schema":
        inner = response_format.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else response_format.get("schema")
        return _schema_grammar(schema, "response_format.json_schema.schema")
    raise ValueError('response_format: use {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}}')


def _call_grammar(tools: list[Tool]) -> str:
    """Of one tool: its arguments. Of several: {"name": ..., "arguments": ...}."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {"type": "object", "properties": {}} for tool in tools}
    if len(schemas) == 1:
        (name, schema), = schemas.items()
        return _schema_grammar(schema, f"the parameters of {name}")
    if "$ref" in json.dumps(schemas):
        raise ValueError("tool_choice: the parameters of these tools have $ref, which only works for one tool: name the one to call")
    calls = [{"type": "object", "properties": {"name": {"const": name}, "arguments": schema}, "required": ["name", "arguments"]} for name, schema in schemas.items()]
    return _schema_grammar({"oneOf": calls}, "the parameters of the tools")


def _schema_grammar(schema: Any, where: str) -> str:
    if not isinstance(schema, dict):
        raise ValueError(f"{where}: give a JSON schema (an object)")
    try:
        text = LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)._grammar
    # the converter knows a part of JSON schema only, and raises what it likes for the rest
    except Exception as error:
        raise ValueError(f"{where}: no grammar can be made of this schema ({' '.join(str(error).split()) or type(error).__name__})") from None
    if loose := sorted(_loose(schema)):
        say(f"{where}: {', '.join(loose)} cannot be enforced by a grammar, the answer may not keep to it")
    return text


def _loose(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(_loose, schema))
    if not isinstance(schema, dict):
        return set()
    named = [part for key in NAMED if isinstance(schema.get(key), dict) for part in schema[key].values()]
    others = [part for key, part in schema.items() if key not in (*NAMED, "const", "enum", "default", "examples")]
    return (schema.keys() & NOT_ENFORCED).union(*map(_loose, [*named, *others]))


def _check(llama: Llama, grammar: Any) -> None:
    """llama.cpp gives a null pointer for a grammar that it cannot parse, and llama-cpp-python passes it on."""
    if not isinstance(grammar, LlamaGrammar):
        raise ValueError("grammar: give a llama_cpp.LlamaGrammar")
    with reasons() as said:
        sampler = llama_cpp.llama_sampler_init_grammar(llama._model.vocab, grammar._grammar.encode(), grammar._root.encode())
        if not sampler:
            raise ValueError(f"the grammar cannot be read: {said.take() or 'llama.cpp refuses it'}")
        llama_cpp.llama_sampler_free(sampler)
