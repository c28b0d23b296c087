"""What the documents name exists, and the examples run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "tests" / "README.md") if path.is_file()
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:prunecli|tests|benchmarks|docs|recipes|examples)/[\w./-]+)`", text))
    linked = {link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) if not link.startswith("http")}
    missing = {name for name in named if not (ROOT / name).exists()}
    missing |= {link for link in linked if not (page.parent / link).exists()}
    assert not missing


@pytest.mark.slow
def test_the_example_of_an_own_model_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "own_model.py"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "logits of an image: (1, 10)" in done.stdout


@pytest.mark.slow
def test_the_example_of_several_targets_runs_and_repeats_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        """
        model: lenet5_relu
        pretrained: false
        data: {name: digits, train_limit: 128, val_limit: 64}
        recover: {steps: []}
        finetune: {epochs: 1}
        spectrum: {samples: 0}
        """
    )
    command = ["bash", str(ROOT / "examples" / "targets.sh"), str(recipe), str(tmp_path), "70%", "50%"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "macs-70" / "report.json").is_file()
    assert (tmp_path / "macs-50" / "report.json").is_file()
    assert done.stderr == "", "the second time there is nothing left to do"
