"""ggml's devices (GPUs, and RPC servers once they are added), by the names that llama.cpp's --device takes."""

from __future__ import annotations

import ctypes as c
import socket
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

from ..runtime.errors import KVCapsuleError
from .library import find_library

TYPES = ("CPU", "GPU", "IGPU", "ACCEL", "META")  # enum ggml_backend_dev_type


class DeviceError(KVCapsuleError):
    """An unknown device or server; the text is one line."""


@dataclass(frozen=True)
class Device:
    """handle: ggml_backend_dev_t; kind: one of TYPES; memory in bytes, 0 if it is not known."""

    handle: int
    name: str
    description: str
    kind: str
    free: int
    total: int


class Devices:
    """The devices that the libraries in a folder know. The folder is the one llama.cpp is loaded from: a library exists once in a process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def all(self) -> list[Device]:
        return [self._device(self._ggml.ggml_backend_dev_get(i)) for i in range(self._ggml.ggml_backend_dev_count())]

    def offload(self) -> list[Device]:
        """Those that layers can go to."""
        return [d for d in self.all() if d.kind not in ("CPU", "ACCEL")]

    def add_rpc(self, servers: str) -> None:
        """Adds the devices of "host:port,host:port". Raises DeviceError."""
        registry = self._ggml.ggml_backend_reg_by_name(b"RPC")
        address = self._ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_rpc_add_server") if registry else None
        if not address:
            raise DeviceError("this llama.cpp was built without RPC: scripts/setup --backend rpc builds it")
        add_server = c.CFUNCTYPE(c.c_void_p, c.c_char_p)(address)
        for server in servers.split(","):
            host, _, port = server.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise DeviceError(f"--rpc {server}: expected host:port")
            try:
                socket.create_connection((host, int(port)), timeout=10).close()  # ggml itself aborts
            except OSError as error:
                raise DeviceError(f"no RPC server at {server}: {error.strerror or error}") from None
            found = add_server(server.encode())
            if not found or not self._ggml.ggml_backend_reg_dev_count(found):
                raise DeviceError(f"the RPC server at {server} has no devices")
            self._ggml.ggml_backend_register(found)

    def choose(self, names: str) -> list[Device]:
        """The devices of "NAME,NAME"; "none" is an empty list. Raises DeviceError."""
        if names == "none":
            return []
        known = {d.name: d for d in self.offload()}
        for name in names.split(","):
            if name not in known:
                raise DeviceError(f"no device {name} (there are: {', '.join(known) or 'none'})")
        return [known[name] for name in names.split(",")]

    def _device(self, handle: int) -> Device:
        free, total = c.c_size_t(), c.c_size_t()
        self._ggml.ggml_backend_dev_memory(handle, c.byref(free), c.byref(total))
        name, description = (f(handle).decode(errors="replace") for f in (self._ggml.ggml_backend_dev_name, self._ggml.ggml_backend_dev_description))
        kind = self._ggml.ggml_backend_dev_type(handle)
        return Device(handle, name, description, TYPES[kind] if kind < len(TYPES) else str(kind), free.value, total.value)

    @cached_property
    def _ggml(self) -> SimpleNamespace:
        # some functions are in the one, some in the other
        parts = [c.CDLL(str(path)) for name in ("ggml", "ggml-base") if (path := find_library(self.directory, name))]
        lib = SimpleNamespace()
        p, s, size = c.c_void_p, c.c_char_p, c.c_size_t
        for name, result, args in [
            ("dev_count", size, []), ("dev_get", p, [size]), ("dev_name", s, [p]), ("dev_description", s, [p]), ("dev_type", c.c_int, [p]),
            ("dev_memory", None, [p, c.POINTER(size), c.POINTER(size)]), ("reg_by_name", p, [s]), ("reg_get_proc_address", p, [p, s]),
            ("reg_dev_count", size, [p]), ("register", None, [p]),
        ]:
            function = next((getattr(part, "ggml_backend_" + name) for part in parts if hasattr(part, "ggml_backend_" + name)), None)
            if function is None:
                raise DeviceError(f"the libraries in {self.directory} have no ggml_backend_{name}: run scripts/setup")
            function.restype, function.argtypes = result, args
            setattr(lib, "ggml_backend_" + name, function)
        return lib
