"""What all tests share: the finished toy run, the folder of real data, and the share of the slow tests to run."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest
from filelock import FileLock

# As the command line does, before anything loads torch: waiting threads that spin make a shared machine crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["PRUNECLI_CACHE"] = ""  # no test finds what another one measured, or what its user did
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-share", metavar="K/N", help="leave out all slow tests but part K (modulo N) of N, split by their ids"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the slow tests of the other shares out. A test stays in its share whatever else is collected."""
    share = config.getoption("--slow-share")
    if share is None:
        return
    try:
        part, parts = (int(number) for number in share.split("/"))
        part %= parts
    except (ValueError, ZeroDivisionError):
        raise pytest.UsageError(f"--slow-share={share} is not two numbers K/N, such as 0/4") from None
    others = [
        item
        for item in items
        if item.get_closest_marker("slow") and int(sha256(item.nodeid.encode()).hexdigest(), 16) % parts != part
    ]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the finished toy job, to read and not to change; made once, whatever the number of workers."""
    from toys.jobs import JOB, call

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "toy-run"
    with FileLock(f"{folder}.lock"):
        if not (folder / "report.json").is_file():
            done = call("compress", *JOB, f"--out={folder}", "--force", full=True)
            assert done.exit_code == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with CIFAR-10, MNIST, photographs and checkpoints; the test is skipped where it is absent."""
    folder = Path(os.environ.get("PRUNECLI_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (folder / "SHA256SUMS").is_file():
        pytest.skip(f"needs the data folder ({folder}); set PRUNECLI_DATA")
    return folder
