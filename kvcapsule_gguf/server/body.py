"""The JSON of a request is read strictly and written anew, so that llama-server reads exactly what was checked here."""

from __future__ import annotations

import json
import math
from typing import Any

from .errors import RequestError

DEPTH = 100
VALUES = 1_000_000  # entries of lists and objects: each of them takes far more memory than its characters


def parse(body: bytes) -> Any:
    """Raises RequestError."""
    if body.count(b",") + body.count(b"[") + body.count(b"{") > VALUES:
        raise RequestError(413, f"the request has more than {VALUES} values")
    try:
        value = json.loads(body.decode(), parse_constant=_constant, parse_float=_finite)
    except UnicodeDecodeError:
        raise RequestError(400, "the request is not UTF-8") from None
    except RecursionError:
        raise RequestError(400, "the request is nested too deeply") from None
    except ValueError as error:
        raise RequestError(400, f"the request is not valid JSON ({error})") from None
    level = [value]
    for _ in range(DEPTH):
        level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in (outer.values() if isinstance(outer, dict) else outer)]
    if level:
        raise RequestError(400, "the request is nested too deeply")
    return value


def written(value: Any) -> bytes:
    """Raises RequestError."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise RequestError(400, "the request has half of a surrogate pair in a string") from None


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value
