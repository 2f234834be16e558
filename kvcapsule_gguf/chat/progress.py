"""What a terminal shows beside the answers, on stderr."""

from __future__ import annotations

import sys

from .engine import Engine
from .session import Turn
from .stats import ImageUse


class Progress:
    """Lines about the capsule, each picture and each answer; none where nobody looks."""

    def __init__(self, engine: Engine, silent: bool) -> None:
        self.engine = engine
        self.on = not silent and sys.stderr.isatty()
        if engine.capsule is not None:
            self._say(f"{f'capsule {engine.capsule_path.name}' if engine.capsule_path else 'built-in capsule'}: pictures are stored compressed")
        elif engine.mmproj is None:
            self._say("no projector (mmproj*.gguf) beside the model: text only")
        elif engine.options.capsule == "off":
            self._say("no capsule (--capsule off): pictures stay uncompressed")

    def picture(self, image: ImageUse, seconds: float | None) -> None:
        """seconds: that it took to read; None: it begins."""
        name = image.name.replace("\\", "/").rsplit("/", 1)[-1]
        if seconds is None:
            self._say(f"{name}: being read...", end="")
            return
        size = f"{image.bytes_f16 / 2**20:.2f} MiB"
        if image.bytes_now < image.bytes_f16:
            size = f"{image.bytes_f16 / 2**20:.2f} -> {image.bytes_now / 2**20:.2f} MiB ({image.bytes_f16 / image.bytes_now:.1f}x)"
        self._say(f"\r{name}: {image.tokens} tokens, {size}, {seconds:.1f} s")

    def answer(self, turn: Turn, cells: int) -> None:
        """cells: tokens in the context."""
        rate = f"{turn.generated_tokens / turn.decode_s:.0f} tokens/s, " if turn.decode_s > 0 else ""
        self._say(f"{turn.generated_tokens} tokens, {rate}context {cells} of {self.engine.n_ctx}")

    def _say(self, text: str, end: str = "\n") -> None:
        if self.on:
            print(text, end=end, file=sys.stderr, flush=True)
