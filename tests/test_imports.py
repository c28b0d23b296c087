"""Imports point down: the order below is the architecture, and a heavy import in the wrong room slows every command."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "prunecli"

# One line a level; modules import from lower levels, or sideways where that makes no cycle.
LEVELS = [
    "errors groups plan report recipe",
    "outputs axes channels score units budget recover sao penalty phase lanczos spectrum lr retraining files"
    " activations",
    "nets zoo graph graph_tp surgery check cost sources data"
    " factory schedule objective checkpoint stopping trainer loop evaluation probe train push gates phase_loop"
    " reconstruction repair prospect",
    "store stages scores gate_plan job phase_stage recovery recovery_steps recovering summary catalog support trial",
    "wording start",
    "plots",
    "render page pipeline progress",
    "console",
    "cli __main__",
]
LEVEL = {name: number for number, line in enumerate(LEVELS) for name in line.split()}
HEAVY = ("torch", "timm", "torchvision", "accelerate", "safetensors", "sklearn", "matplotlib", "numpy", "torch_pruning")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if room(path) != "__init__"]


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if not top_level_only else tree.body
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path: Path, **kwargs: bool) -> set[str]:
    names = {name.split(".")[1] for name in imports(path, **kwargs) if name.startswith("prunecli.")}
    return {name for name in names if name in LEVEL} - {room(path)}


def test_every_module_has_a_level():
    assert {room(path) for path in modules()} == set(LEVEL)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    upward = {name for name in own(path) if LEVEL[name] > LEVEL[room(path)]}
    assert not upward


def test_no_cycles():
    edges: dict[str, set[str]] = {}
    for path in modules():
        edges.setdefault(room(path), set()).update(own(path))
    done: set[str] = set()
    while ready := {name for name, below in edges.items() if name not in done and below <= done}:
        done |= ready
    assert done == set(edges), f"in a cycle: {sorted(set(edges) - done)}"


def test_the_command_line_imports_nothing_heavy_before_a_command_needs_it():
    code = "import prunecli.cli, prunecli.recipe, prunecli.catalog, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {name for name in loaded if name.split(".")[0] in HEAVY}


@pytest.mark.parametrize("level", [0])
def test_values_hold_no_tensor(level):
    for path in modules():
        if LEVEL[room(path)] == level:
            assert not {name.split(".")[0] for name in imports(path)} & set(HEAVY)


def test_only_the_edge_prints():
    for path in modules():
        if LEVEL[room(path)] < LEVEL["render"]:
            names = {name.split(".")[0] for name in imports(path)}
            assert not names & {"typer", "rich"}, path
