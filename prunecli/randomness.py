"""The process's global random generators: Python's, numpy's and torch's. timm and torchvision draw from all three."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def own_randomness(device: torch.device | None = None) -> Iterator[None]:
    """Leave the global random generators as they were found.

    Args:
        device: device whose torch generator is kept too, where it is a CUDA device; the CPU's always is.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm draws from the global one
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
