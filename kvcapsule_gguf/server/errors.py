"""Errors of requests, in the form that OpenAI's clients read."""

from __future__ import annotations

import json

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 413: "request_too_large", 501: "not_supported_error", 503: "unavailable_error"}

# llama-server answers 500 to these, though it is the request that is at fault (400), or too many of them at once (503)
CLIENT_FAULTS = {
    "Failed to load image": 400,
    "Failed to download image": 400,
    "Invalid base64": 400,
    "image input is not supported": 400,
    "number of bitmaps": 400,
    "Failed to tokenize prompt": 400,
    "Failed to parse messages": 400,
    "Failed to parse tool": 400,
    "is required": 400,
    "json.exception": 400,
    "_M_range_check": 400,  # a token that the model does not have
    "Context size has been exceeded": 503,
    "failed to process mtmd chunk": 503,
}


class RequestError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def body(self) -> bytes:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return json.dumps({"error": {"code": self.status, "message": str(self), "type": kind}}).encode()


def repaired(status: int, content_type: str, body: bytes) -> RequestError | None:
    """What an error of llama-server should have been; None if it is right as it is."""
    message = body.decode("utf-8", "replace").strip()
    try:
        message = str(json.loads(body)["error"]["message"])
        known = "json" in content_type
    except (ValueError, KeyError, TypeError):
        known = False
    better = next((code for words, code in CLIENT_FAULTS.items() if words in message), status) if status == 500 else status
    if better == 503 and status == 500:
        message += " (the cache is shared by all slots: try again, or raise -c)"
    return None if known and better == status else RequestError(better, message or f"HTTP {status}")
