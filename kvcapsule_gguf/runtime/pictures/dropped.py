"""Paths as people write them and as terminals paste them when a file is dropped: quoted, with backslashes, or as file:// URLs."""

from __future__ import annotations

import os
import re
import shlex
import urllib.parse
import urllib.request
from pathlib import Path

from .decode import SUFFIXES

# a quoted text (in which '\'' or '"'"' stands for '), or what stands between spaces, where a backslash joins the next character to it
_WORD = re.compile(r"""'[^']*'(?:(?:\\'|"'")'[^']*')*|"[^"]*"|(?:\\.|[^\s\\'"])(?:\\.|[^\s\\])*""")


def unquoted(text: str) -> str:
    """The path that `text` stands for. A file of exactly this name comes first, so that a name may hold quotes, backslashes and commas."""
    text = text.strip() if not _exists(text) else text
    if _exists(text):
        return text
    if text[:5].lower() == "file:":
        return _file_url(text)
    try:
        words = shlex.split(text) if os.sep == "/" or text[:1] in "'\"" else [text]
    except ValueError:  # a quote without its partner
        words = [text]
    if len(words) != 1:
        return text
    return _file_url(words[0]) if words[0][:5].lower() == "file:" else words[0]


def split_dropped(line: str) -> tuple[list[str], str]:
    """The pictures that were dropped into a line, and the line without them. Only whole paths (/, ~, file:, a drive or quotes) of files that are there
    and have a picture's suffix are taken: a name that is only spoken of stays."""
    found: list[str] = []

    def take(match: re.Match[str]) -> str:
        word = match[0]
        if not word.lower().rstrip("'\"").endswith(SUFFIXES):
            return word
        path = unquoted(word)
        if not (Path(path).is_absolute() or path[:1] == "~") or not _exists(path):
            return word
        found.append(path)
        return ""

    rest = _WORD.sub(take, line)
    return (found, " ".join(rest.split())) if found else ([], line)


def split_pasted(text: str) -> list[str]:
    """The sources in what stands after /image: one, or several files that were dropped together."""
    several, rest = split_dropped(text)
    return several if several and not rest and not _exists(unquoted(text)) else [text]


def split_listed(text: str) -> list[str]:
    """The sources in FILE[,FILE]. URLs and names of files may hold commas of their own."""
    if text[:5].lower() == "data:":
        return [text]
    if re.match("https?://", text, re.IGNORECASE):
        return re.split(",(?=https?://)", text, flags=re.IGNORECASE)
    found: list[str] = []
    parts = text.split(",")
    while parts:
        n = next((n for n in range(len(parts), 1, -1) if _exists(unquoted(",".join(parts[:n])))), 1)
        found.append(",".join(parts[:n]))
        del parts[:n]
    return [name for name in found if name]


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def _file_url(url: str) -> str:
    """file:///a/b, file://localhost/a/b and file:/a/b."""
    parts = urllib.parse.urlsplit(url, allow_fragments=False)
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    host = "" if parts.netloc.lower() in ("", "localhost") else f"//{parts.netloc}"
    return urllib.request.url2pathname(host + path)
