"""--device, --rpc, --list-devices: which devices layers go to."""

from __future__ import annotations

import ctypes

from ..native import DeviceError, Devices, load
from .args import Options
from .errors import ChatError


def known_devices(options: Options) -> Devices:
    """All devices, those of --rpc too. Raises ChatError."""
    known = Devices(load().directory)
    try:
        if options.rpc:
            known.add_rpc(options.rpc)
    except DeviceError as error:
        raise ChatError(str(error)) from None
    return known


def choose_devices(options: Options) -> ctypes.Array | None:
    """A list of devices that ends with NULL; None: all that there are. Raises ChatError."""
    known = known_devices(options)
    if options.device is None:
        return None
    try:
        handles = [device.handle for device in known.choose(options.device)]
    except DeviceError as error:
        raise ChatError(str(error)) from None
    return (ctypes.c_void_p * (len(handles) + 1))(*handles, None)


def list_devices(options: Options) -> None:
    """Prints what layers can go to."""
    print("Available devices:")
    for device in known_devices(options).offload():
        print(f"  {device.name}: {device.description} ({device.total >> 20} MiB, {device.free >> 20} MiB free)")
