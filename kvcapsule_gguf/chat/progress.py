"""What stderr tells beside the answers: the capsule, each picture and, at a terminal, each answer."""

from __future__ import annotations

import shutil
import sys
import threading

from .engine import Engine
from .session import Turn
from .stats import ImageUse

PAUSE_S = 0.2


class Progress:
    """silent: nothing at all, since the answers say it themselves."""

    def __init__(self, engine: Engine, silent: bool) -> None:
        self.engine = engine
        self.silent = silent
        self.terminal = not silent and sys.stderr.isatty()
        self._named = self.terminal  # which capsule it is
        self._bar: _Bar | None = None
        if engine.capsule_line:
            self._say(engine.capsule_line, self.terminal)
        elif engine.mmproj is None:
            self._say("no projector (mmproj*.gguf) beside the model: text only", self.terminal)
        elif engine.options.capsule == "off":
            self._say("no capsule (--capsule off): pictures stay uncompressed", self.terminal)

    def picture(self, image: ImageUse, seconds: float | None, total: int) -> None:
        """seconds: that it took to read; None: it begins. total: its tokens."""
        if not self._named and self.engine.capsule_line:
            self._named = True
            self._say(self.engine.capsule_line)
        name = image.name.replace("\\", "/").rsplit("/", 1)[-1]
        if seconds is None:
            if self.terminal:
                self._bar = _Bar(name, image, total)
            return
        self.stop()
        size = f"{image.bytes_f16 / 2**20:.2f} MiB"
        if image.bytes_now < image.bytes_f16:
            size = f"{image.bytes_f16 / 2**20:.2f} -> {image.bytes_now / 2**20:.2f} MiB ({image.bytes_f16 / image.bytes_now:.1f}x)"
        elif self.engine.capsule is not None:
            size += " as before (no tier is good enough for it)"
        self._say(f"{name}: {image.tokens} tokens, {size}, {seconds:.1f} s", self.terminal or self.engine.capsule is not None)

    def stop(self) -> None:
        """Whatever has happened: a bar that is still there goes."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def answer(self, turn: Turn, cells: int) -> None:
        """cells: tokens in the context."""
        rate = f"{turn.generated_tokens / turn.decode_s:.0f} tokens/s, " if turn.decode_s > 0 else ""
        self._say(f"{turn.generated_tokens} tokens, {rate}context {cells} of {self.engine.n_ctx}", self.terminal)

    def _say(self, text: str, wanted: bool = True) -> None:
        if wanted and not self.silent:
            print(text, file=sys.stderr, flush=True)


class _Bar:
    """On the last line, while native code works: the tokens of a picture that are in the cache, and the time."""

    def __init__(self, name: str, image: ImageUse, total: int) -> None:
        from tqdm import tqdm

        size = shutil.get_terminal_size()  # tqdm shows nothing where a terminal says that it has no lines
        form = "{desc}: being read |{bar:20}| {n_fmt}/{total_fmt} tokens, {elapsed}"
        self._bar = tqdm(total=total, desc=name, file=sys.stderr, leave=False, ncols=size.columns, nrows=size.lines, bar_format=form)
        self._image, self._end = image, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(PAUSE_S):
            self._bar.n = self._image.tokens
            self._bar.refresh()

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self._bar.close()
