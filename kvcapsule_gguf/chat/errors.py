"""Errors that end a command with one line."""


class ChatError(Exception):
    """The text is one clear line for the user."""


class ContextFull(ChatError):
    """The conversation, or the picture, does not fit; what fitted before is still there."""
