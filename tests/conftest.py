"""Shared fixtures: where real data lies, and one thread so that runs repeat."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with CIFAR-10, MNIST, photographs and checkpoints; the test is skipped where it is absent."""
    folder = Path(os.environ.get("PRUNECLI_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (folder / "SHA256SUMS").is_file():
        pytest.skip(f"needs the data folder ({folder}); set PRUNECLI_DATA")
    return folder
