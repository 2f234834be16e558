"""Brings a prompt into the cache: what is there stays, what is on disk is loaded, the rest is evaluated."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ..reuse.parts import ImagePart, Item, common
from ..reuse.prefixes import Prefixes
from ..runtime import interrupts
from ..runtime.errors import ContextFull, KVCapsuleError
from ..runtime.pictures import Picture
from .contents import SEQ, Contents
from .prompt import Chunk
from .stats import ImageUse


class Lost(Exception):
    """A state from disk turned out to be unusable, and what the cache held is gone."""


@dataclass
class Work:
    """What one prompt took."""

    tokens_evaluated: int = 0
    vision_tokens: int = 0
    images_encoded: int = 0
    images_loaded: int = 0
    compress_s: float = 0.0


def fill(contents: Contents, chunks: list[Chunk], pictures: list[Picture], work: Work, *, append: bool, prefixes: Prefixes | None) -> None:
    """Makes the cache hold `chunks`, or, to append, what it holds and `chunks`. Raises KVCapsuleError, ContextFull, Lost (append only)."""
    if not chunks or chunks[-1].tokens is None:
        raise KVCapsuleError("the model's chat template puts nothing after the picture, so there is nothing to answer")
    new = [item for chunk in chunks for item in chunk.items]
    base = len(contents.items) if append else 0
    wanted = contents.items + new if append else new
    if append:
        done = base
    else:
        # at least one token is evaluated: its logits choose the first of the answer
        done = contents.rewind(min(common(contents.items, wanted), len(wanted) - 1))
    if prefixes is not None:
        before = sum(isinstance(item, ImagePart) for item in wanted[:done])
        with interrupts.deferred():
            if (found := prefixes.find(contents.engine.ctx, SEQ, wanted, done)) is not None:
                done = _take(contents, wanted[: found.n_items], found.note)
        if done < base:
            raise Lost
        work.images_loaded = sum(isinstance(item, ImagePart) for item in wanted[:done]) - before
    _check_room(contents, rest := _after(chunks, done - base), pictures)
    _evaluate(contents, rest, pictures, work, prefixes)


def _take(contents: Contents, items: list[Item], note: Any) -> int:
    """The library has been given the state of these items; how many of them are there now."""
    try:
        contents.load(items, [ImageUse.from_json(value) for value in note or []])
    except (KeyError, TypeError, ValueError):  # a file that nobody of us has written
        contents.clear()
    return len(contents.items)


def _after(chunks: list[Chunk], n: int) -> list[Chunk]:
    """What is left of the chunks without their first n items."""
    rest = []
    for chunk in chunks:
        size = len(chunk.items)
        if n <= 0:
            rest.append(chunk)
        elif n < size and chunk.tokens is not None:
            rest.append(Chunk(size - n, tokens=chunk.tokens[n:]))
        n -= size
    return rest


def _evaluate(contents: Contents, chunks: list[Chunk], pictures: list[Picture], work: Work, prefixes: Prefixes | None) -> None:
    uses: dict[int, ImageUse] = {}
    totals: dict[int, int] = {}
    last = {chunk.picture: index for index, chunk in enumerate(chunks)}
    begun = 0.0
    last_image = max((i for i, chunk in enumerate(chunks) if chunk.tokens is None), default=-1)
    for index, chunk in enumerate(chunks):
        work.tokens_evaluated += chunk.n_tokens
        if chunk.tokens is not None:
            contents.add_text(chunk.tokens, last=index == len(chunks) - 1)
            continue
        if chunk.picture not in uses:
            uses[chunk.picture] = ImageUse(pictures[chunk.picture].name)
            totals[chunk.picture] = sum(c.n_tokens for c in chunks if c.picture == chunk.picture)
            contents.on_picture(uses[chunk.picture], None, totals[chunk.picture])
            begun = time.monotonic()
        image = uses[chunk.picture]
        contents.add_image(chunk, image)
        start = time.monotonic()
        contents.compress(chunk, image)
        work.compress_s += time.monotonic() - start
        work.vision_tokens += chunk.n_tokens
        if index == last[chunk.picture]:
            contents.on_picture(image, time.monotonic() - begun, totals[chunk.picture])
        if prefixes is not None and index == last_image:
            prefixes.put(contents.engine.ctx, SEQ, contents.items, contents.to_note())
    work.images_encoded = len(uses)


def _check_room(contents: Contents, chunks: list[Chunk], pictures: list[Picture]) -> None:
    """Refuses what cannot fit before anything is computed. Raises ContextFull, KVCapsuleError."""
    engine = contents.engine
    n_ctx, needed = engine.n_ctx, sum(chunk.n_tokens for chunk in chunks)
    if contents.n_cells + needed >= n_ctx:
        raise ContextFull(f"the context is full: {contents.n_cells} of {n_ctx} tokens are used and {needed} more are needed (-c sets its size, /clear empties it)")
    n_ubatch = engine.llama.llama_n_ubatch(engine.ctx)
    for chunk in chunks:
        if chunk.tokens is None and chunk.n_tokens > n_ubatch and engine.native.mtmd.mtmd_decode_use_non_causal(engine.mtmd_ctx, chunk.handle):
            raise KVCapsuleError(f"{pictures[chunk.picture].name} has {chunk.n_tokens} tokens, and this model needs them in one batch of {n_ubatch}: {engine.more_ubatch}")
