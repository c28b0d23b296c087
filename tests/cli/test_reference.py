"""docs/cli.md is what Typer's generator makes of the commands as they are."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_is_not_stale():
    pinned = re.search(r"^typer==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    if version("typer") != pinned[1]:
        pytest.skip(f"docs/cli.md was made with Typer {pinned[1]}, and {version('typer')} may word it otherwise")
    command = [sys.executable, "-m", "typer", "prunecli.cli.app", "utils", "docs", "--name", "prunecli"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == made.rstrip("\n") + "\n", "`make docs` renews it"
