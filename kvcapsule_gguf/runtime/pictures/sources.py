"""Where pictures come from: a path, file://, an http(s) or data URL, bare base64, stdin."""

from __future__ import annotations

import base64
import binascii
import http.client
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from .decode import decode
from .dropped import unquoted
from .limits import Budget, PictureError
from .picture import Picture

TIMEOUT_S = 30
STANDARD = str.maketrans("-_", "+/", "= \t\n\r\f\v")


def load(source: str, budget: Budget | None = None, name: str = "") -> Picture:
    """Reads and decodes; name: for messages, the source if it is empty. Raises PictureError."""
    name = name or short(source)
    return decode(read(source, budget, name), budget, name)


def read(source: str, budget: Budget | None = None, name: str = "") -> bytes:
    """The file that `source` names: a path (also as terminals paste it), file://, http(s):// or data: URL, or - for stdin. Raises PictureError."""
    name, budget = name or short(source), budget or Budget()
    most = budget.limits.file_bytes + 1
    if source == "-":
        data = sys.stdin.buffer.read(most)
    elif source[:5].lower() == "data:":
        data = from_data_url(source, budget, name)
    elif is_remote(source):
        data = _http(source, name, most)
    else:
        data = _file(Path(unquoted(source)), name, most)
    if not data:
        raise PictureError(f"{name}: empty")
    budget.check_file(len(data), name)
    return data


def is_remote(source: str) -> bool:
    return source[:8].lower().startswith(("http://", "https://"))


def from_data_url(source: str, budget: Budget | None = None, name: str = "the picture") -> bytes:
    """data:[type][;base64],...: the type is ignored, since the contents say it; case does not matter. Raises PictureError."""
    head, comma, body = source.partition(",")
    if head[:5].lower() != "data:" or not comma:
        raise PictureError(f"{name}: data URL without data")
    if "base64" not in [word.strip().lower() for word in head.split(";")[1:]]:
        return urllib.parse.unquote_to_bytes(body)
    return from_base64(urllib.parse.unquote(body) if "%" in body else body, budget, name)


def from_base64(text: str, budget: Budget | None = None, name: str = "the picture") -> bytes:
    """Base64 as it is found: broken into lines, without its padding, or of the kind for URLs (- and _). Raises PictureError."""
    text = text.translate(STANDARD)
    (budget or Budget()).check_file(len(text) * 3 // 4, name)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise PictureError(f"{name}: broken base64") from None


def short(source: str) -> str:
    """What a source is called in messages."""
    return source if len(source) <= 80 else source[:77] + "..."


def _file(path: Path, name: str, most: int) -> bytes:
    try:
        path = path.expanduser()
        if path.is_dir():
            raise PictureError(f"{name}: is a folder, not a picture")
        with path.open("rb") as file:
            return file.read(most)
    except PictureError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise PictureError(f"{name}: {getattr(error, 'strerror', None) or error}") from None


def _http(source: str, name: str, most: int) -> bytes:
    request = urllib.request.Request(source, headers={"User-Agent": "kvcapsule"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return response.read(most)
    except urllib.error.HTTPError as error:
        raise PictureError(f"{name}: HTTP {error.code} {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise PictureError(f"{name}: {getattr(error, 'reason', None) or error or type(error).__name__}") from None
