"""A process that runs jobs of the command line and breaks them off at a chosen step; driven by ``test_pipeline``.

A step is one change of the run folder (a file opened for writing, renamed or removed, a folder made), seen through
Python's audit hooks, so that the program under test knows nothing of it. Each job is a fork of this process: torch and
timm are imported once.

Reads one JSON object a line: ``arguments``, ``folder``, ``stop_at`` (the step before which the signal is sent, or
null), ``signal``. Answers with one: ``status`` (exit status, or minus the signal), ``stderr``, ``steps`` (names).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401 - this and what follows is imported once, for all jobs
import torch

from prunecli.cli.app import app
from prunecli.run import pipeline  # noqa: F401
from prunecli.show import tables  # noqa: F401
from toys.jobs import without_extras

CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "open"})


def watch(folder: str, stop_at: int | None, number: int, record: int) -> None:
    """Write the name of each step to ``record``; send this process the signal before step ``stop_at``."""
    done = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event not in CHANGES or (event == "open" and not set(str(arguments[1])) & set("wax+")):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        if not os.path.realpath(path).startswith(folder):
            return
        done += 1
        shown = Path(os.path.realpath(path)).relative_to(folder)
        os.write(record, f"{event} {str(shown).replace(str(os.getpid()), 'PID')}\n".encode())
        if done == stop_at:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def job(order: dict[str, Any], record: int, said: int) -> None:
    """The forked child: never returns."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w") for number in (1, 2))
    watch(os.path.realpath(order["folder"]), order.get("stop_at"), order.get("signal", 9), record)
    try:
        app(args=order["arguments"], prog_name="prunecli")
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(int(end.code or 0))
    os._exit(99)


def main() -> None:
    torch.set_num_threads(1)
    without_extras(pytest.MonkeyPatch())
    for line in sys.stdin:
        with tempfile.TemporaryFile() as record, tempfile.TemporaryFile() as said:
            child = os.fork()
            if child == 0:
                job(json.loads(line), record.fileno(), said.fileno())
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            record.seek(0), said.seek(0)
            steps, stderr = record.read().decode().splitlines(), said.read().decode()
        sys.stdout.write(json.dumps({"status": status, "stderr": stderr, "steps": steps}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
