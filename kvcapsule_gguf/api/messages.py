"""The messages of a request: checked, and their pictures found in whatever form they are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TEXTS = ("text", "input_text", "output_text")
PICTURES = ("image_url", "input_image", "image")
# beside `content`, where some clients put media
OTHER_MEDIA = ("image", "image_url", "video", "videos", "audio", "attachments", "experimental_attachments")


def read_messages(messages: Any, marker: str) -> tuple[list[dict[str, Any]], list[str]]:
    """(messages for a chat template, with `marker` as the text of each picture; the URLs of the pictures in order). A content of None becomes "".

    A picture is {"type": "image_url", "image_url": URL or {"url": URL}}, {"type": "input_image", "image_url": URL}, {"type": "image"} with `url`, `image`
    or a `source` as Anthropic's API has it, or one of a message's `images` in base64, as Ollama's has it; in a message of any role. Raises ValueError for
    everything else, with a line that says where."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("messages: give a list with at least one message")
    read: list[dict[str, Any]] = []
    urls: list[str] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}: give an object with role and content")
        if message.get("role") not in ROLES:
            raise ValueError(f"{where}: unknown role {message.get('role')!r}, use one of {', '.join(ROLES)}")
        for key in OTHER_MEDIA:
            if message.get(key):
                raise ValueError(f"{where}: {key} is not read, put pictures into content as parts of type image_url")
        before = _images(message.get("images"), where)
        content = _content(message, where, marker, urls, before)
        read.append({**{key: value for key, value in message.items() if key != "images"}, "content": content})
    return read, urls


def _content(message: Mapping[str, Any], where: str, marker: str, urls: list[str], before: list[str]) -> Any:
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        content = ""  # what a client sends back after a call of a tool
    if not isinstance(content, (str, list, tuple)):
        raise ValueError(f"{where}: content is {'missing' if content is None else type(content).__name__}, give text or a list of parts")
    urls += before
    if isinstance(content, str):
        return marker * len(before) + content
    parts = [{"type": "text", "text": marker} for _ in before]
    for number, part in enumerate(content):
        place = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in PICTURES:
            urls.append(_picture(part, place))
            parts.append({"type": "text", "text": marker})
        elif kind in TEXTS:
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{place}: text is missing, or not text")
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise ValueError(f"{place}: a part of type {kind!r} is not read, use text or image_url" if kind else f"{place}: give an object with a type, text or image_url")
    return parts


def _picture(part: Mapping[str, Any], where: str) -> str:
    """The URL of a picture."""
    found = next((part[key] for key in ("image_url", "url", "image") if part.get(key) is not None), None)
    if isinstance(found, Mapping):
        found = found.get("url")
    source = part.get("source")
    if found is None and isinstance(source, Mapping):
        found = source.get("url")
        if source.get("type") == "base64" and isinstance(source.get("data"), str):
            found = f"data:{source.get('media_type') or ''};base64,{source['data']}"
    if not isinstance(found, str) or not found:
        raise ValueError(f"{where}: the picture has no URL, give its data: or http(s) URL as image_url.url")
    return found


def _images(images: Any, where: str) -> list[str]:
    if not images:
        return []
    if not isinstance(images, (list, tuple)) or not all(isinstance(image, str) and image for image in images):
        raise ValueError(f"{where}: images must be a list of texts, each a picture in base64 or its URL")
    return [image if image[:8].lower().startswith(("data:", "http://", "https://")) else f"data:;base64,{image}" for image in images]
