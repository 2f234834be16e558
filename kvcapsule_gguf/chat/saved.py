"""/save and /load: a conversation in a file, with its pictures and the state of the cache.

The state is used only where model, projector, capsule and settings are the same; otherwise the conversation is there and is evaluated again when it goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..reuse import container, memory
from ..reuse.digest import model_digest
from ..reuse.parts import Item, from_json, positions, to_json
from ..runtime import interrupts
from ..runtime.errors import KVCapsuleError
from ..runtime.marker import MARKER
from ..runtime.pictures import Budget, PictureError, decode
from .contents import SEQ
from .session import Session
from .stats import ImageUse

KIND = "conversation"


def save(session: Session, path: Path, ask: Callable[[str], bool] | None = None) -> str:
    """Returns a line for the user. ask: whether a file that is no kept conversation may be replaced; None: never. Raises KVCapsuleError."""
    engine, state = session.engine, session.state
    if not any(message["role"] == "user" for message in session.messages):
        raise KVCapsuleError("there is no conversation yet, so nothing was saved")
    path = path.resolve()  # a link stays, and what it leads to is replaced
    if path.exists() and container.kind(path) != KIND:
        if not path.is_file():
            raise KVCapsuleError(f"{path} is not a file: choose another name")
        if ask is None:
            raise KVCapsuleError(f"{path} exists and is not a kept conversation: choose another name, or remove it first")
        if not ask(f"{path} exists and is not a kept conversation. Replace it?"):
            return "not saved"
    data = memory.state(engine.llama, engine.ctx, SEQ) if state.items else None
    header = {
        "kind": KIND,
        "binding": engine.binding,
        "model": [engine.path.name, model_digest(engine.path)],
        "undone": session.undone,
        "marker": MARKER,
        "messages": session.messages,
        "pictures": [picture.name for picture in session.pictures],
        "text": state.text,
        "items": to_json(state.items),
        "images": state.to_note(),
        "pos_max": engine.llama.llama_memory_seq_pos_max(engine.memory, SEQ),
    }
    blobs = [data or b"", *(picture.data for picture in session.pictures)]
    try:
        container.write(path, header, blobs)
        return f"{path}: {path.stat().st_size / 2**20:.1f} MiB"
    except OSError as error:
        raise KVCapsuleError(f"{path}: {error.strerror or error}") from None


def load(session: Session, path: Path) -> str:
    """Returns a line for the user. Raises KVCapsuleError; the conversation is then as it was."""
    try:
        header, blobs = container.read(path)
        if header.get("kind") != KIND:
            raise container.Damaged(f"{path} is not a kept conversation")
        messages = [{"role": str(m["role"]), "content": _marked(m["content"], header["marker"], MARKER)} for m in header["messages"]]
        budget = Budget()
        pictures = [decode(bytes(blob), budget, str(name)) for name, blob in zip(header["pictures"], blobs[1:], strict=True)]
        items = from_json(header["items"])
        text, pos_max = _marked(header["text"], header["marker"], MARKER), int(header["pos_max"])
        name, digest = (str(part) for part in header["model"])
        undone = bool(header["undone"])
        images = [ImageUse.from_json(value) for value in header["images"]]
        if sum(message["content"].count(MARKER) for message in messages) != len(pictures):
            raise ValueError("its pictures are not those of its questions")
    except PictureError:
        raise
    except OSError as error:
        raise KVCapsuleError(f"{path}: {error.strerror or error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KVCapsuleError(f"{path} is not a conversation that this version reads ({error!r})") from None
    with interrupts.deferred():
        session.clear()
        session.messages, session.pictures = messages, pictures
        ready = _restore(session, header["binding"], items, images, blobs[0], pos_max)
        session.state.text = text if ready else ""
        session.undone = undone and ready
    turns = sum(message["role"] == "user" for message in messages)
    said = f"{turns} question{'s' * (turns != 1)} and {len(pictures)} picture{'s' * (len(pictures) != 1)}"
    if ready:
        return f"{said}, ready"
    other = digest != model_digest(session.engine.path)
    why = f"of another model ({name}), whose answers stay in the conversation" if other else "saved with other files or settings"
    return f"{'warning: ' * other}{said}; {why}: they are read again with the next question"


def _restore(session: Session, binding: str, items: list[Item], images: list[ImageUse], blob: memoryview, pos_max: int) -> bool:
    engine = session.engine
    if not items:
        return True
    if binding != engine.binding or not 0 <= pos_max < positions(items) <= engine.n_ctx or not memory.restore(engine.llama, engine.ctx, SEQ, blob, pos_max):
        return False
    session.state.load(items, images)
    return True


def _marked(text: str, theirs: str, ours: str) -> str:
    return str(text).replace(theirs, ours)
