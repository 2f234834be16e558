"""The llama-server process: which flags and capsule it gets, its start and its end."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ..chat import capsules, files, hub
from ..format.base_model import read_base_model
from ..format.capsule import CapsuleError
from ..format.fingerprint import fingerprint_of
from ..format.gguf_header import GGUFError, read_header
from ..format.projector import check_projector, fixed_tokens
from ..native.library import library_dir
from ..runtime import program
from ..runtime.errors import KVCapsuleError
from ..runtime.scratch import Scratch
from .args import DEFAULT_CTX, Options

STOP_S = 10.0
STARTS = 5  # llama-server is given up when it has ended so many times in a row
YOUNG_S = 10.0  # an end so soon after it was ready is one of a row
PAUSE_S = 1.0  # before its second start in a row; before each further one twice as long
KEPT = ("LLAMA_KVCAPSULE_PATH",)  # no flag says it
LINE = re.compile(r"(?:[\d.]+ (?P<level>[A-Z]) )?(?P<text>.*)")  # of its log: time and level, except where it is about to abort
UNKNOWN_PICTURE = 2048  # tokens, for projectors of variable size
_libc = ctypes.CDLL(None) if os.name != "nt" else None


def find_binary() -> Path:
    """Raises KVCapsuleError."""
    name = "llama-server" + (".exe" if os.name == "nt" else "")
    folder = library_dir()
    for path in (folder / "bin" / name, folder / name):
        if path.is_file():
            return path
    raise KVCapsuleError(f"there is no llama-server in {folder / 'bin'}: run scripts/setup --tools")


class Upstream:
    """llama-server on a socket of its own that nobody else can reach; `token` is the key it wants."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        """Raises KVCapsuleError; nothing is left running then."""
        self.options = options
        self.say = say
        binary = find_binary()
        if os.name == "nt":
            raise KVCapsuleError(f"kvcapsule-server needs Unix sockets, which Windows has not: start {binary} with LLAMA_KVCAPSULE in its environment")
        model, mmproj = hub.fetch(options.hf_repo) if options.hf_repo else (options.model, options.mmproj)
        assert model is not None
        self.model = files.check_model(model)
        self.mmproj = files.find_mmproj(self.model, options.mmproj or mmproj)
        self.capsule = self._find_capsule()
        self.token = secrets.token_urlsafe(32)
        self._scratch = Scratch()
        self.folder = self._scratch.path
        self.socket = self.folder / "llama.sock"
        self.media = self.folder / "media"  # pictures on their way to llama-server
        self.media.mkdir()
        self.lines: deque[str] = deque(maxlen=200)
        self.ready = False  # it has loaded the model, and answers
        self._ready_since = 0.0
        self._ends = 0  # in a row
        self._next_start: float | None = None  # when it has ended
        try:
            self._start()
        except BaseException:
            self._scratch.close()
            raise

    def _start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [str(find_binary()), *self._flags()],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to pass on
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def tend(self) -> None:
        """To be called again and again, always by the thread that made this object: the kernel ties the process to it. Raises KVCapsuleError if it cannot be started."""
        now = time.monotonic()
        if self._next_start is not None:
            if now >= self._next_start:
                self._next_start = None
                self._start()
        elif self.process.poll() is not None:
            self._ended(now)
        elif not self.ready and self._answers():
            self.lines.clear()  # what was said while it started explains no later end
            self.ready, self._ready_since = True, now

    def _ended(self, now: float) -> None:
        """Plans the next start. Raises KVCapsuleError if there is to be none: it has never been ready, or it ends again and again."""
        if self.ready and now - self._ready_since >= YOUNG_S:
            self._ends = 0
        self.ready = False
        self._ends += 1
        reason = f"llama-server {self.reason()}"
        if not self._ready_since:
            raise KVCapsuleError(reason)
        if self._ends == STARTS:
            raise KVCapsuleError(f"{reason}; it is not started again, since it has ended {STARTS} times in a row")
        pause = PAUSE_S * 2 ** (self._ends - 2) if self._ends > 1 else 0.0
        self._next_start = now + pause
        self.say(f"{reason}; it is started again{f' in {pause:g} s' if pause else ''}")

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inner:
                inner.settimeout(1)
                inner.connect(str(self.socket))
                inner.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                return b" 200 " in inner.recv(64)
        except OSError:
            return False

    def reason(self) -> str:
        """How it ended, and its first line about an error, the capsule's first."""
        self._reader.join(timeout=2)
        status = self.process.poll() or 0
        how = f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
        if status == -signal.SIGKILL:
            how += " (is there enough memory?)"
        read = [(match["level"], match["text"].strip()) for line in self.lines if (match := LINE.fullmatch(line))]
        faults = [(level, text) for level, text in read if level in ("E", None)]
        found = next((text for words in (r"\bcapsule\b", "assert") for _, text in faults if re.search(words, text, re.IGNORECASE)), "")
        found = found or next((text for level, text in faults if level or re.search("error|failed", text, re.IGNORECASE)), "")
        return f"{how}: {found}" if found else how

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._scratch.close()

    def _find_capsule(self) -> str | None:
        """What LLAMA_KVCAPSULE is to say; None: nothing."""
        setting = self.options.capsule
        optional = setting in (files.AUTO, files.NO_FILE)
        if setting == "off" or self.mmproj is None:
            if setting != "off" and not optional:
                raise KVCapsuleError("a capsule needs a vision projector: give it with --mmproj, or put mmproj*.gguf beside the model")
            return None
        try:
            base = read_base_model(self.model)
            if base.rope_type:
                check_projector(self.mmproj, base.rope_type in ("mrope", "imrope"))
            architecture, fingerprint = base.architecture, fingerprint_of(base)
        except CapsuleError as error:
            if optional or setting == files.BUILT_IN:
                if optional:
                    self.say(capsules.uncompressed(str(error)))
                    return None
                raise
            architecture = fingerprint = ""
        path = None if setting in (files.BUILT_IN, files.NO_FILE) else files.find_capsule(setting, self.model, self.mmproj, architecture, fingerprint)
        if path is not None and not optional and (info := files.read_info(path)) is not None and not info.damaged and not info.fits(architecture, fingerprint):
            # llama-server would go on without it
            raise KVCapsuleError(f"{path} is a capsule for another model")
        return files.AUTO if path is None else str(path)

    def capsule_name(self) -> str:
        """For people."""
        if self.capsule is None:
            return "no capsule"
        return capsules.described(None if self.capsule == files.AUTO else Path(self.capsule), self.options.quality, self.options.ratio)

    def _flags(self) -> list[str]:
        options = self.options
        flags = ["--host", str(self.socket), "-m", str(self.model), "-np", str(options.parallel), "--kv-unified", "-c", str(self._context())]
        if self.mmproj is not None:
            flags += ["--mmproj", str(self.mmproj)]
        # /slots shows what others ask
        return [*flags, "--media-path", str(self.media), "--metrics", "--no-slots", *options.rest]

    def _context(self) -> int:
        if self.options.n_ctx is not None:
            return self.options.n_ctx
        try:
            values = read_header(self.model, lambda key: key == "general.architecture" or key.endswith(".context_length")).values
            trained = int(values[f"{values['general.architecture'].data}.context_length"].data)
        except (GGUFError, OSError, KeyError, TypeError, ValueError):
            return DEFAULT_CTX
        return min(DEFAULT_CTX, trained)

    def _hot(self) -> int:
        """As in the library, but for a picture in each slot: while they are read they are all in the hot cache."""
        assert self.capsule is not None
        try:
            value = read_header(Path(self.capsule), lambda key: key == "kvcapsule.image_tokens").values.get("kvcapsule.image_tokens")
            picture = int(value.data) if value else 0
        except (GGUFError, OSError, TypeError, ValueError):
            picture = 0  # the built-in one, or a damaged file, which llama-server will name
        return self.options.parallel * (picture or UNKNOWN_PICTURE) + max(2048, self._context() // 4)

    def _environment(self) -> dict[str, str]:
        # flags say everything (AIP_ opens another endpoint); the keys of the clients are checked before they get here
        env = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_KVCAPSULE", "LLAMA_ARG_", "AIP_")) or name in KEPT}
        env["LLAMA_API_KEY"] = self.token
        # glibc would keep the memory of large requests, for each of its threads
        env = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"} | env
        if self.capsule is not None:
            env["LLAMA_KVCAPSULE"] = self.capsule
            env["LLAMA_KVCAPSULE_HOT"] = str(self.options.n_hot or self._hot())
            if self.mmproj is not None and (tokens := fixed_tokens(self.mmproj)):
                env["LLAMA_KVCAPSULE_IMAGE_TOKENS"] = str(tokens)
            for name, value in (("QUALITY", self.options.quality), ("RATIO", self.options.ratio), ("IMAGE_ATTENTION", self.options.image_attention)):
                if value:
                    env[f"LLAMA_KVCAPSULE_{name}"] = str(value)
        return env

    def _read(self, output: IO[bytes]) -> None:
        for raw in output:
            line = raw.decode("utf-8", "replace").rstrip()
            self.lines.append(line)
            if self.options.verbose:
                program.say(line)
            elif "can not attach the capsule" in line:  # a warning, and the model goes without it
                self.say(line.partition(": ")[2])


def _end_with_parent() -> None:
    """Even a front that was killed leaves no server behind. It runs between fork and exec, where a lock of another thread may never become free: so it only calls."""
    assert _libc is not None
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
