"""What a grammar or a JSON schema would cost llama-server, estimated before it gets there: its own parser recurses and copies without a limit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from .errors import RequestError

DEPTH = 64  # brackets inside brackets
BYTES = 1 << 18  # of a grammar, or of all schemas of a request
PATTERN = 4096  # characters of a pattern in a schema
ELEMENTS = 100_000  # after repetitions are written out; of a grammar, or of all schemas of a request
STACKS = 1000  # ways to go on that are kept for every position

GBNF = re.compile(
    r"""\s+ | \#[^\n\r]* | (?P<rule>[\w-]+)\s*::= | (?P<char>"(?:\\.|[^"\\])*" | \[(?:\\.|[^\]\\])*\] | !?<[^>]*> | \.) | (?P<name>[\w-]+)
      | (?P<mark>[()|]) | (?P<times>[*+?] | \{\s*\d+\s*(?:,\s*(?:\d+\s*)?)?\})""",
    re.VERBOSE | re.DOTALL,
)
REGEX = re.compile(
    r"(?P<char>\\. | \[(?:\\.|[^\]\\])*\]) | (?P<times>[*+?] | \{\d*(?:,\d*)?\}) | (?P<mark>\((?:\?[:=!])? | [)|]) | (?P<rule>(?!)) | (?P<name>(?!)) | (?P<other>[^\[])",
    re.VERBOSE | re.DOTALL,
)

Item = tuple[Any, int, "int | None"]  # (None: characters, str: a rule, list: a group), least and most repetitions; None = no end
Rule = list[list[Item]]  # alternatives of sequences


def check_grammar(text: str) -> None:
    """Raises RequestError."""
    if len(text) > BYTES:
        raise RequestError(400, f"the grammar has {len(text)} characters, at most {BYTES} are taken")
    _check(text, GBNF, "the grammar")


def check_schemas(schemas: list[Any]) -> None:
    """All those of a request, which share one budget. Raises RequestError."""
    size, repeated = len(json.dumps(schemas)), 0
    if size > BYTES:
        raise RequestError(400, f"the JSON schemas have {size} characters, at most {BYTES} are taken in a request")
    waiting = [(schema, 1) for schema in schemas]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEPTH:
            raise RequestError(400, f"a JSON schema is nested more than {DEPTH} deep")
        if isinstance(value, dict):
            repeated += sum(int(max(0, n)) for key in ("minLength", "maxLength", "minItems", "maxItems") if isinstance(n := value.get(key), (int, float)))
            if isinstance(pattern := value.get("pattern"), str):
                if len(pattern) > PATTERN:
                    raise RequestError(400, f"a pattern of a JSON schema has {len(pattern)} characters, at most {PATTERN} are taken")
                repeated += _check(pattern, REGEX, "a pattern of a JSON schema")
        if repeated > ELEMENTS:
            raise RequestError(400, f"the lengths and patterns in the JSON schemas of a request add up to more than {ELEMENTS}")
        if isinstance(value, (dict, list)):
            waiting += [(inner, depth + 1) for inner in (value.values() if isinstance(value, dict) else value)]


def _check(text: str, syntax: re.Pattern[str], what: str) -> int:
    """Its elements, repetitions written out. Raises RequestError."""
    rules, elements = _parse(text, syntax, what)
    if elements > ELEMENTS:
        raise RequestError(400, f"{what} repeats too much: {ELEMENTS} elements are taken")
    known: dict[str, tuple[int, int]] = {}
    try:
        if any(_ways(rule, rules, known)[1] > STACKS for rule in rules.values()):
            raise RequestError(400, f"{what} is ambiguous: there are more than {STACKS} ways to go on at one place (look for nested parts that may be empty)")
    except RecursionError:
        raise RequestError(400, f"{what} is nested too deeply") from None
    return elements


def _tokens(text: str, syntax: re.Pattern[str], what: str) -> Iterator[tuple[str, str]]:
    """Raises RequestError."""
    at = 0
    while at < len(text):
        match = syntax.match(text, at)
        if match is None:
            raise RequestError(400, f"{what} cannot be read at its character {at}: {text[at : at + 20]!r}")
        at = match.end()
        if match.lastgroup:
            yield match.lastgroup, match[match.lastgroup]


def _parse(text: str, syntax: re.Pattern[str], what: str) -> tuple[dict[str, Rule], int]:
    current: Rule = [[]]
    rules: dict[str, Rule] = {"": current}
    open_groups: list[Rule] = []
    elements = 0
    for kind, token in _tokens(text, syntax, what):
        elements += 1
        if kind == "rule":
            open_groups.clear()
            current = rules[token] = [[]]
        elif kind == "times":
            if current[-1]:
                least, most = _bounds(token)
                current[-1][-1] = (current[-1][-1][0], least, most)
                elements += max(least, most or 0)
        elif token == "|" and kind == "mark":
            current.append([])
        elif kind == "mark" and token[0] == "(":
            if len(open_groups) == DEPTH:
                raise RequestError(400, f"{what} is nested more than {DEPTH} deep")
            open_groups.append(current)
            current = [[]]
        elif kind == "mark":
            if open_groups:
                group, current = current, open_groups.pop()
                current[-1].append((group, 1, 1))
        elif token != '""':
            elements += len(token)
            current[-1].append((token if kind == "name" else None, 1, 1))
    return rules, elements


def _bounds(token: str) -> tuple[int, int | None]:
    if token[0] != "{":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[token]
    least, comma, most = (part.strip() for part in token[1:-1].partition(","))
    low = min(int(least or 0), ELEMENTS + 1)
    return low, low if not comma else min(int(most), ELEMENTS + 1) if most else None


def _ways(rule: Rule, rules: dict[str, Rule], known: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """In how many ways the rule matches nothing, and the most ways to go on at its start or behind any of its items. Both stop at STACKS + 1."""
    empty = most = total = 0
    for sequence in rule:
        e = s = 1
        for what, low, high in reversed(sequence):
            inner_e, inner_s = _ways_of(what, rules, known)
            one_e, one_s = (1, inner_s + 1) if high is None else (1, 1)
            # optional ones, each inside the one before, then those that must be there
            for n in range(min(low if high is None else high, 2000)):
                may_end = high is not None and n < high - low
                one_e, one_s = _least(inner_e * one_e + may_end), _least(inner_s + inner_e * one_s + may_end)
                if one_s > STACKS:
                    break
            e, s = _least(one_e * e), _least(one_s + one_e * s)
            most = max(most, s, inner_s)
        empty, total = _least(empty + e), _least(total + s)
    return empty, max(most, total)


def _ways_of(what: Any, rules: dict[str, Rule], known: dict[str, tuple[int, int]]) -> tuple[int, int]:
    if isinstance(what, list):
        return _ways(what, rules, known)
    if what is None or what not in rules:
        return 0, 1
    if what not in known:
        known[what] = 0, 1  # inside itself; llama-server refuses what begins with itself
        known[what] = _ways(rules[what], rules, known)
    return known[what]


def _least(n: int) -> int:
    return min(n, STACKS + 1)
