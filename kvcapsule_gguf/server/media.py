"""Pictures in a request: where they come from, how large they are, and a kind that llama-server reads."""

from __future__ import annotations

import base64
import binascii
import io
import json
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..chat import images
from .errors import RequestError

READ_BY_LLAMA_SERVER = {"PNG", "JPEG", "BMP", "GIF"}


@dataclass(frozen=True)
class Limits:
    body_bytes: int
    image_bytes: int
    pixels: float
    remote_images: bool


def checked(body: bytes, limits: Limits) -> bytes:
    """The body of a JSON request, pictures of other kinds rewritten as PNG. Raises RequestError."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the request is not valid JSON ({error})") from None
    try:
        changed = _walk(request, limits)
    except RecursionError:
        raise RequestError(400, "the request is nested too deeply") from None
    return json.dumps(request).encode() if changed else body


def _walk(value: Any, limits: Limits) -> bool:
    """Checks every picture, and rewrites some in place: True then."""
    if isinstance(value, list):
        return any([_walk(item, limits) for item in value])
    if not isinstance(value, dict):
        return False
    changed = any([_walk(item, limits) for item in value.values()])
    for name in ("input_audio", "input_video", "video_url"):
        other = value.get(name)
        for text in other.values() if isinstance(other, dict) else [other]:
            _origin(text, limits)
    for holder, key in _pictures(value):
        text = holder[key]
        holder[key] = _picture(text, limits)
        changed |= holder[key] is not text
    return changed


def _origin(text: Any, limits: Limits) -> bool:
    """True for what is on another server."""
    if not isinstance(text, str) or text[:4].lower() != "http":
        return False
    if not limits.remote_images:
        raise RequestError(400, "pictures from other servers are not fetched here: send them as data: URLs (the server's --remote-images allows them)")
    return True


def _pictures(value: dict[str, Any]) -> list[tuple[Any, Any]]:
    """(holder, key) of the pictures that an object has itself: OpenAI's image_url (chat, responses), Anthropic's source, llama.cpp's multimodal_data."""
    found: list[tuple[Any, Any]] = []
    image = value.get("image_url")
    if isinstance(image, dict):
        found.append((image, "url"))
    elif image is not None:
        found.append((value, "image_url"))
    source = value.get("source")
    if isinstance(source, dict):
        found.append((source, "url" if source.get("type") == "url" else "data"))
    several = value.get("multimodal_data")
    if isinstance(several, list):
        found += [(several, i) for i in range(len(several))]
    return [(holder, key) for holder, key in found if isinstance(holder[key] if isinstance(holder, list) else holder.get(key), str)]


def _picture(text: str, limits: Limits) -> str:
    if _origin(text, limits):
        return text
    head, comma, data = text.partition(",")
    if text.startswith("file:") or (comma and not head.startswith("data:image/")):
        raise RequestError(400, "a picture must be a data:image/...;base64 URL")
    if comma and not head.endswith(";base64"):
        raise RequestError(400, "a picture must be base64 encoded")
    try:
        raw = base64.b64decode(data if comma else text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(400, "a picture's base64 is broken") from None
    if len(raw) > limits.image_bytes:
        raise RequestError(413, f"a picture has {len(raw) / 2**20:.1f} MiB, at most {limits.image_bytes >> 20} are taken")
    try:
        with Image.open(io.BytesIO(raw)) as image:
            kind, (width, height) = image.format, image.size
    except Image.DecompressionBombError as error:
        raise RequestError(413, f"a picture has too many pixels, at most {limits.pixels / 1e6:g} million are taken") from error
    except Exception:
        raise RequestError(400, "a picture cannot be read") from None
    if width * height > limits.pixels:
        raise RequestError(413, f"a picture has {width} x {height} pixels, at most {limits.pixels / 1e6:g} million are taken")
    if kind in READ_BY_LLAMA_SERVER:
        return text
    return _as_png(raw)


def _as_png(raw: bytes) -> str:
    try:
        picture = images.decode(raw, "a picture")
    except images.ImageError as error:
        raise RequestError(400, str(error)) from None
    out = io.BytesIO()
    Image.frombytes("RGB", (picture.width, picture.height), picture.rgb.tobytes()).save(out, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
