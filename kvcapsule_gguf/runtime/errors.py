"""Errors that end a command, or one request, with one line."""


class KVCapsuleError(Exception):
    """str(error) is one clear line for the user: what is wrong and, where that is known, what to do."""


class InputError(KVCapsuleError, ValueError):
    """What the user gave is refused. Programs that use this package may catch it as a ValueError."""


class CapsuleError(KVCapsuleError):
    """A capsule file, or a call of the capsule API, is refused."""


class ContextFull(KVCapsuleError):
    """The conversation, or the picture, does not fit; what fitted before is still there."""
