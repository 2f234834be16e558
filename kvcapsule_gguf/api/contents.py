"""The cache of a llama_cpp.Llama, in the terms of the chat: the same matching, compression and image cache work on both."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llama_cpp import Llama

from .. import native
from ..chat.args import CACHE_TYPES
from ..chat.contents import Contents
from ..reuse.binding import binding
from ..reuse.parts import ImagePart, Item
from ..reuse.prefixes import Prefixes
from .quiet import Said

FILLER = 0  # at the positions of a picture, where Llama wants a token that exists


class LlamaEngine:
    """What chat.engine.Engine is to the chat, around a Llama that is open already."""

    prefixes: Prefixes | None = None
    more_ubatch = "raise n_ubatch (and n_batch)"

    def __init__(self, llama: Llama, mtmd_ctx: Any, mmproj: Path | None, capsule_path: Path | None) -> None:
        self._owner = weakref.ref(llama)  # it is freed as soon as nobody else has it
        self.native = native.load()
        self.llama = self.native.llama
        self.ctx, self.model, self.vocab = llama.ctx, llama.model, llama._model.vocab
        self.memory = self.llama.llama_get_memory(self.ctx)
        self.n_ctx = llama.n_ctx()
        self.mtmd_ctx = mtmd_ctx
        self.mmproj, self.capsule_path = mmproj, capsule_path
        self.capsule = True if native.is_attached(self.ctx) else None
        names = {number: name for name, number in CACHE_TYPES.items()}
        params = llama.context_params
        self.options = SimpleNamespace(cache_type_k=names[params.type_k], cache_type_v=names[params.type_v])
        self.log = Said()  # empty: llama.cpp is heard in reasons() only

    def is_of(self, llama: Llama) -> bool:
        return self._owner() is llama

    def binding(self, owner: Llama) -> str:
        params = owner.context_params
        rope = [name for name, _ in params._fields_ if name.startswith(("rope_", "yarn_"))]
        settings: dict[str, object] = {name: getattr(params, name) for name in ("type_k", "type_v", "flash_attn_type", *rope)}
        settings |= {"api": True, "n_ctx": self.n_ctx, "compressed": self.capsule is not None}
        settings |= {name: getattr(owner, name, os.environ.get(f"LLAMA_KVCAPSULE_{name.upper()}")) for name in ("quality", "ratio", "image_attention")}
        if owner.lora_path:
            settings["lora"] = f"{owner.lora_scale} {Path(owner.lora_path).stat()}"
        return binding(Path(owner.model_path), self.mmproj, self.capsule_path, settings, self.native.directory)


class LlamaContents(Contents):
    """Llama keeps the tokens of its cache in input_ids[:n_tokens], by position; pictures are known here only."""

    engine: LlamaEngine  # type: ignore[assignment]

    def __init__(self, engine: LlamaEngine, llama: Llama) -> None:
        super().__init__(engine)  # type: ignore[arg-type]
        self._owner = weakref.proxy(llama)
        self._seen = llama.input_ids

    def sync(self) -> None:
        """Takes over what happened since: tokens that were generated, a reset, a state that was loaded."""
        llama = self._owner
        if llama.input_ids is not self._seen:
            # Llama.load_state() brings an array of its own; which pictures its cache holds is not known
            self._seen, self.items, self.images = llama.input_ids, [], []
        ids = llama.input_ids[: llama.n_tokens].tolist()
        items: list[Item] = []
        at = 0
        for item in self.items:
            n = item.n_pos if isinstance(item, ImagePart) else 1
            if ids[at : at + n] != ([FILLER] * n if isinstance(item, ImagePart) else [item]):
                break
            items.append(item)
            at += n
        items += ids[at:]
        super()._set(items, [image for image in self.images if image.first < len(items)])

    def add_text(self, tokens: Sequence[int], last: bool) -> None:
        self._owner.eval(tokens)
        self.items += tokens
        self.n_past += len(tokens)
        self.n_cells += len(tokens)

    def add_image(self, chunk: Any, image: Any) -> None:
        start = self.n_past
        super().add_image(chunk, image)
        self._place(start, self.n_past)

    def _set(self, items: list[Item], images: list) -> None:
        super()._set(items, images)
        if not items:
            self._owner.reset()
        at = 0
        for item in items:
            n = item.n_pos if isinstance(item, ImagePart) else 1
            self._owner.input_ids[at : at + n] = FILLER if isinstance(item, ImagePart) else item
            at += n
        self._place(at, at)

    def _place(self, start: int, end: int) -> None:
        self._owner.input_ids[start:end] = FILLER
        owner: Any = self._owner  # a weak proxy
        owner.n_tokens, owner._requires_eval = end, True
