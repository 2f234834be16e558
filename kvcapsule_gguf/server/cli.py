"""kvcapsule-server: starts both parts, and ends them in the right order."""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from ..runtime import pictures, program
from ..runtime.errors import KVCapsuleError
from . import args
from .args import Options
from .launch import Upstream
from .media import Limits

M_MMAP_THRESHOLD = -3  # of mallopt


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 after a signal to stop, Ctrl-C included, 1 error (one line on stderr), 2 wrong command line."""
    program.open_streams()
    options = args.parse(sys.argv[1:] if argv is None else argv)
    return program.guarded("kvcapsule-server", lambda: run(options))


def run(options: Options) -> int:
    _return_memory()
    stop: list[int] = []  # the signal that ends it. An Event has a lock, which the thread that the signal interrupts may hold
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]
    before = {number: signal.getsignal(number) for number in numbers}

    def ask(number: int, _: object) -> None:
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one is taken as it comes

    for number in before:
        signal.signal(number, ask)
    try:
        serve(options, stop)
        return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _return_memory() -> None:
    """What a large picture took goes back when it is done. glibc would keep blocks of its size from then on."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)


def serve(options: Options, stop: Sequence[int]) -> None:
    """Until `stop` has a signal. Raises KVCapsuleError."""
    try:
        from .gateway import Gateway
    except ModuleNotFoundError as error:
        raise KVCapsuleError(f"{error.name} is missing: pip install {error.name}") from None
    upstream = Upstream(options, say)
    try:
        most = pictures.Limits(options.max_image_mib << 20, int(options.max_megapixels * 1e6), int(options.max_megapixels * 4e6), options.max_images)
        try:
            gateway = Gateway((options.host, options.port), upstream, Limits(options.max_body_mib << 20, most, options.remote_images), options.api_keys)
        except OSError as error:
            raise KVCapsuleError(f"{options.host}:{options.port} cannot be used: {error.strerror or error}") from None
        gateway.start()
        host, port = gateway.server_address[:2]
        shown = f"[{host}]" if ":" in str(host) else host
        say(f"listening on http://{shown}:{port} ({upstream.capsule_name()}; {options.parallel} slots{', API key' if options.api_keys else ''})")
        while not stop:
            upstream.tend()
            time.sleep(0.1)
        say("stopping: running answers are finished first")
        if not gateway.drain(options.drain_s):
            say(f"some answers were not finished after {options.drain_s:g} s")
    finally:
        upstream.stop()


def say(text: str) -> None:
    program.say(f"kvcapsule-server: {text}")


if __name__ == "__main__":
    sys.exit(main())
