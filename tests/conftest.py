"""Shared fixtures: where real data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# As the command line does, before anything loads torch: waiting threads that spin make a shared machine crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with CIFAR-10, MNIST, photographs and checkpoints; the test is skipped where it is absent."""
    folder = Path(os.environ.get("PRUNECLI_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (folder / "SHA256SUMS").is_file():
        pytest.skip(f"needs the data folder ({folder}); set PRUNECLI_DATA")
    return folder
