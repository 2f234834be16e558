"""A tool that must be called: its schema becomes the grammar of the answer."""

from __future__ import annotations

import json
from typing import Any

from llama_cpp import Llama
from llama_cpp.llama_grammar import JSON_GBNF, LlamaGrammar


def choose_tool(llama: Llama, functions: Any, function_call: Any, tools: Any, tool_choice: Any, grammar: Any) -> tuple[dict[str, Any] | None, Any]:
    """The tool that `tool_choice` (or the older `function_call`) names, None if the model is free, and the grammar. Raises ValueError for an unknown name."""
    if functions is not None:
        tools = [{"type": "function", "function": function} for function in functions]
    if isinstance(function_call, dict) and "name" in function_call:
        tool_choice = {"type": "function", "function": {"name": function_call["name"]}}
    if not isinstance(tool_choice, dict) or tools is None:
        return None, grammar
    name = tool_choice["function"]["name"]
    tool = next((tool for tool in tools if tool["function"]["name"] == name), None)
    if tool is None:
        raise ValueError(f"Tool choice '{name}' not found in tools.")
    try:
        return tool, LlamaGrammar.from_json_schema(json.dumps(tool["function"]["parameters"]), verbose=llama.verbose)
    # the converter knows a part of JSON schema only, and raises what it likes for the rest
    except Exception:
        return tool, LlamaGrammar.from_string(JSON_GBNF, verbose=llama.verbose)
