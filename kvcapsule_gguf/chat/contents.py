"""What the KV cache of a conversation holds, and the ways to change it: more text, a picture, back to an earlier point, a state from disk."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from .. import native
from ..reuse import memory
from ..reuse.parts import Item, cells, positions
from ..runtime import interrupts
from ..runtime.errors import ContextFull, KVCapsuleError
from .engine import Engine
from .prompt import Chunk
from .stats import ImageUse, plain_bytes

SEQ = 0


class Contents:
    """items: tokens and pictures in order; images: the pictures among them, `first` is the index of their first item; text: the prompt that all this
    is, "" when only the items are known.

    Positions and cells differ: an M-RoPE picture of n cells takes max(rows, columns) positions."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.items: list[Item] = []
        self.images: list[ImageUse] = []
        self.text = ""
        self.n_past = 0
        self.n_cells = 0
        # a picture, the seconds that it took (None: it is about to be read), its tokens
        self.on_picture: Callable[[ImageUse, float | None, int], None] = lambda image, seconds, total: None

    def clear(self) -> None:
        self.engine.llama.llama_memory_clear(self.engine.memory, True)
        self._set([], [])

    def rewind(self, n_items: int) -> int:
        """Keeps the first items, and drops whatever the library holds beyond them; returns how many are left: 0 when the model cannot go back."""
        engine = self.engine
        kept = self.items[:n_items]
        with interrupts.deferred():
            if not memory.rewind(engine.llama, engine.ctx, engine.model, SEQ, positions(kept)):
                kept = []
            self._set(kept, [image for image in self.images if image.first < len(kept)])
        return len(kept)

    def settle(self) -> None:
        """After an interruption: what the library holds beyond the items is dropped, and the text is no longer known."""
        self.rewind(len(self.items))

    def add_text(self, tokens: Sequence[int], last: bool) -> None:
        """last: the logits of the last token are wanted."""
        llama, n_batch = self.engine.llama, self.engine.llama.llama_n_batch(self.engine.ctx)
        batch = llama.llama_batch_init(min(len(tokens), n_batch), 0, 1)
        try:
            for start in range(0, len(tokens), n_batch):
                piece = tokens[start : start + n_batch]
                batch.n_tokens = len(piece)
                for i, token in enumerate(piece):
                    batch.token[i] = token
                    batch.pos[i] = self.n_past + i
                    batch.n_seq_id[i] = 1
                    batch.seq_id[i][0] = SEQ
                    batch.logits[i] = last and start + i == len(tokens) - 1
                self._check(llama.llama_decode(self.engine.ctx, batch))
                self.items += piece
                self.n_past += len(piece)
                self.n_cells += len(piece)
        finally:
            llama.llama_batch_free(batch)

    def add_image(self, chunk: Chunk, image: ImageUse) -> None:
        """Encodes and decodes a picture, or a slice of one."""
        engine = self.engine
        assert chunk.image is not None
        after = engine.llama.llama_pos(self.n_past)
        n_batch = engine.llama.llama_n_batch(engine.ctx)
        self._check(engine.native.mtmd.mtmd_helper_eval_chunk_single(engine.mtmd_ctx, engine.ctx, chunk.handle, self.n_past, SEQ, n_batch, False, ctypes.byref(after)))
        if not image.tokens:
            image.first = len(self.items)
            self.images.append(image)
        self.items.append(chunk.image)
        self.n_past = after.value
        self.n_cells += chunk.n_tokens
        image.tokens += chunk.n_tokens
        if engine.capsule is None:
            f16, cell = plain_bytes(engine)
            image.bytes_f16 += chunk.n_tokens * f16
            image.bytes_now += chunk.n_tokens * cell

    def compress(self, chunk: Chunk, image: ImageUse) -> None:
        """The chunk that was added last. Automatic mode would do it with the next text; done here, it can be timed and counted per picture."""
        engine = self.engine
        if engine.capsule is None:
            return
        assert chunk.image is not None
        with interrupts.deferred():
            before = native.stats(engine.ctx)
            moved = native.compress(engine.ctx, SEQ, self.n_past - chunk.image.n_pos, self.n_past)
            now = native.stats(engine.ctx)
            image.moved += moved
            image.slots = {name: image.slots.get(name, 0) + n - before.slots[name] for name, n in now.slots.items()}
            image.bytes_f16 += chunk.n_tokens * now.bytes_f16_token
            image.bytes_now += now.bytes_slots - before.bytes_slots + (chunk.n_tokens - moved) * now.bytes_hot // max(now.n_hot, 1)

    def load(self, items: list[Item], images: list[ImageUse]) -> None:
        """The library has just been given a state that holds `items`, with these pictures."""
        self._set(items, images)

    def to_note(self) -> list[dict[str, object]]:
        return [{**image.as_json(), "first": image.first} for image in self.images]

    def _set(self, items: list[Item], images: list[ImageUse]) -> None:
        self.items, self.images, self.text = items, images, ""
        self.n_past, self.n_cells = positions(items), cells(items)

    def _check(self, status: int) -> None:
        if status == 0:
            self.engine.log.take()
            return
        interrupts.check()  # it may be the reason
        # no room is a warning for the library, which then goes on without the batch
        reason = self.engine.log.take(about="cache is full" if status == 1 else "")
        if status == 1:
            raise ContextFull(reason or f"the context is full ({self.n_cells} of {self.engine.n_ctx} tokens are used)")
        raise KVCapsuleError(f"the model could not be evaluated: {reason or f'status {status}'}")
