"""Pictures kept on disk: the state of each prompt prefix that ends with one, keyed by the whole prefix and by all that the state depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..native.library import Library
from . import memory
from .parts import Item, prefix_keys
from .store import Store

DEFAULT_MIB = 1024


@dataclass(frozen=True)
class Found:
    """n_items of the prompt are in the cache now; note: what put() was told about them."""

    n_items: int
    note: Any


class Prefixes:
    """Nothing here raises after creation: what cannot be read is a miss, what cannot be written is told once and left out."""

    def __init__(self, folder: Path, mib: int, binding: str, llama: Library, say: Callable[[str], None]) -> None:
        """Raises OSError when the folder cannot be made."""
        self._store = Store(Path(folder), mib << 20)
        self._binding = binding
        self._llama = llama
        self._say = say
        self._told = False

    def find(self, ctx: int, seq: int, items: Sequence[Item], n_held: int) -> Found | None:
        """Loads the longest prefix of `items` that is kept, if it is longer than n_held; what the sequence held is gone then.

        When a state that looked whole is refused by the library, the sequence is empty and the answer Found(0, None)."""
        for n, key in reversed(list(prefix_keys(self._binding.encode(), items))):
            if n <= n_held:
                return None
            if (entry := self._store.get(key)) is None:
                continue
            header, blobs = entry
            if header.get("binding") != self._binding or header.get("key") != key or len(blobs) != 1:
                self._store.drop(key)
            elif memory.restore(self._llama, ctx, seq, blobs[0], int(header.get("pos_max", -1))):
                return Found(n, header.get("note"))
            else:
                self._store.drop(key)
                return Found(0, None)
        return None

    def put(self, ctx: int, seq: int, items: Sequence[Item], note: Any) -> None:
        """Keeps the sequence, which holds exactly `items`; the last one is a picture. note: JSON."""
        keys = list(prefix_keys(self._binding.encode(), items))
        if not keys or keys[-1][0] != len(items) or (state := memory.state(self._llama, ctx, seq)) is None:
            return
        pos_max = self._llama.llama_memory_seq_pos_max(self._llama.llama_get_memory(ctx), seq)
        header = {"kind": "prefix", "binding": self._binding, "key": keys[-1][1], "pos_max": pos_max, "note": note}
        try:
            if not self._store.put(keys[-1][1], header, [state]):
                self._tell(f"a picture of {len(state) >> 20} MiB is larger than the image cache may be (--image-cache-mib)")
        except OSError as error:
            self._tell(f"the image cache cannot be written ({error.strerror or error})")

    def _tell(self, text: str) -> None:
        if not self._told:
            self._told = True
            self._say(text)
