"""The device that a job runs on."""

from __future__ import annotations

from typing import Final

import torch

from prunecli.errors import UsageError

_DEVICES: Final = ("cpu", "cuda")


def resolve_device(name: str) -> torch.device:
    """The device for a name that a user typed: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UsageError: the name is unknown, or this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"Unknown device {name!r}.", hint="Known: auto, cpu, cuda, cuda:N.") from None
    if device.type not in _DEVICES:
        raise UsageError(f"Unknown device {name!r}.", hint="Known: auto, cpu, cuda, cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"Device {name} was asked for, but {torch.cuda.device_count()} CUDA devices are visible.")
    return device
