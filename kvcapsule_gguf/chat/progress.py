"""What stderr tells beside the answers: the capsule, each picture and, at a terminal, each answer."""

from __future__ import annotations

import sys

from .engine import Engine
from .session import Turn
from .stats import ImageUse


class Progress:
    """silent: nothing at all, since the answers say it themselves."""

    def __init__(self, engine: Engine, silent: bool) -> None:
        self.engine = engine
        self.silent = silent
        self.terminal = not silent and sys.stderr.isatty()
        self._named = self.terminal  # which capsule it is
        if engine.capsule_line:
            self._say(engine.capsule_line, self.terminal)
        elif engine.mmproj is None:
            self._say("no projector (mmproj*.gguf) beside the model: text only", self.terminal)
        elif engine.options.capsule == "off":
            self._say("no capsule (--capsule off): pictures stay uncompressed", self.terminal)

    def picture(self, image: ImageUse, seconds: float | None) -> None:
        """seconds: that it took to read; None: it begins."""
        if not self._named and self.engine.capsule_line:
            self._named = True
            self._say(self.engine.capsule_line)
        name = image.name.replace("\\", "/").rsplit("/", 1)[-1]
        if seconds is None:
            self._say(f"{name}: being read...", self.terminal, end="")
            return
        size = f"{image.bytes_f16 / 2**20:.2f} MiB"
        if image.bytes_now < image.bytes_f16:
            size = f"{image.bytes_f16 / 2**20:.2f} -> {image.bytes_now / 2**20:.2f} MiB ({image.bytes_f16 / image.bytes_now:.1f}x)"
        elif self.engine.capsule is not None:
            size += " as before (no tier is good enough for it)"
        self._say(f"{chr(13) * self.terminal}{name}: {image.tokens} tokens, {size}, {seconds:.1f} s", self.terminal or self.engine.capsule is not None)

    def answer(self, turn: Turn, cells: int) -> None:
        """cells: tokens in the context."""
        rate = f"{turn.generated_tokens / turn.decode_s:.0f} tokens/s, " if turn.decode_s > 0 else ""
        self._say(f"{turn.generated_tokens} tokens, {rate}context {cells} of {self.engine.n_ctx}", self.terminal)

    def _say(self, text: str, wanted: bool = True, end: str = "\n") -> None:
        if wanted and not self.silent:
            print(text, end=end, file=sys.stderr, flush=True)
