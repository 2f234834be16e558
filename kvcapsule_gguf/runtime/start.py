"""The commands of the package. Reading its modules takes a moment, in which Ctrl-C counts as well: so this one needs nothing."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def _main(name: str) -> int:
    from importlib import import_module

    return import_module(f"kvcapsule_gguf.{name}.cli").main()


def bench() -> int:
    return _main("bench")


def chat() -> int:
    return _main("chat")


def evaluate() -> int:
    return _main("eval")


def inspect() -> int:
    return _main("inspect")


def server() -> int:
    return _main("server")


def train() -> int:
    return _main("train")
