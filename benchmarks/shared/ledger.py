"""Measured records in one JSON file: each key once, several occasions and processes add to the same file."""

from __future__ import annotations

import datetime as dt
import fcntl
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

import prunecli
from prunecli.files import read_json, write_json


def package_commit() -> str:
    """The last commit that changed the package, with ``+`` where its files differ from it; empty outside git."""
    package = Path(prunecli.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words, "--", "."], cwd=package, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("log", "-1", "--format=%h") + "+" * bool(git("status", "--porcelain"))


class Ledger:
    """Records by key. Adding reads the file anew under a lock, so that parallel processes lose nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.commit = package_commit()  # now, since the package may change under a long measurement

    @property
    def records(self) -> dict[str, Any]:
        return dict(read_json(self.path)) if self.path.is_file() else {}

    def add(self, found: Mapping[str, Mapping[str, Any]], *, device: torch.device) -> None:
        """Enter records with date, commit, versions and device beside what was measured; equal keys are replaced."""
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
        stamp = {
            "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
            "commit": self.commit,
            "versions": f"torch {torch.__version__}, timm {timm.__version__}, prunecli {prunecli.__version__}",
            "device": where,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            merged = self.records | {key: {**record, **stamp} for key, record in found.items()}
            write_json(self.path, dict(sorted(merged.items())))
        finally:
            os.close(folder)
