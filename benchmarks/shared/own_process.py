"""One model, one process: a crash, a hang or a leak of one does not touch the figures of the others."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def in_own_process(script: str, *arguments: str, timeout_s: float) -> dict[str, Any]:
    """The JSON object that ``script ARGUMENTS`` prints last; else ``{"problem": why there is none}``."""
    try:
        done = subprocess.run(
            [sys.executable, script, *arguments], capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"not finished after {timeout_s:g} s"}
    if done.returncode:
        return {"problem": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])
