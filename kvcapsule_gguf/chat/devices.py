"""--device, --rpc, --list-devices: which devices layers go to."""

from __future__ import annotations

import ctypes

from ..native import Devices, load
from .args import Options


def known_devices(options: Options) -> Devices:
    """All devices, those of --rpc too. Raises DeviceError."""
    known = Devices(load().directory)
    if options.rpc:
        known.add_rpc(options.rpc)
    return known


def choose_devices(options: Options) -> ctypes.Array | None:
    """A list of devices that ends with NULL; None: all that there are. Raises DeviceError."""
    known = known_devices(options)
    if options.device is None:
        return None
    handles = [device.handle for device in known.choose(options.device)]
    return (ctypes.c_void_p * (len(handles) + 1))(*handles, None)


def list_devices(options: Options) -> None:
    """Prints what layers can go to."""
    print("Available devices:")
    for device in known_devices(options).offload():
        print(f"  {device.name}: {device.description} ({device.total >> 20} MiB, {device.free >> 20} MiB free)")
