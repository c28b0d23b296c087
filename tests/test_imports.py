"""What is imported: nothing heavy before it is needed, the promised names, and no test file by another.

The order of the wings is held by the import contracts in ``pyproject.toml`` (``lint-imports``).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prunecli

TESTS = Path(__file__).parent
HEAVY = {"torch", "timm", "torchvision", "accelerate", "safetensors", "sklearn", "matplotlib", "numpy", "torch_pruning"}
PUBLIC = {"Recipe", "Report", "__version__", "compress", "jacobian_spectrum", "load", "orthogonalize_", "recommend_lr"}


def loaded_by(code: str) -> set[str]:
    """The top-level names of all modules that a fresh process has loaded once it ran ``code``."""
    command = [sys.executable, "-P", "-c", f"import sys; {code}; print(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "modules",
    [
        ["prunecli.cli.app", "prunecli.recipe.recipe", "prunecli.recipe.packaged"],
        ["prunecli.values.plan", "prunecli.values.report", "prunecli.values.support_matrix", "prunecli.show.tables"],
    ],
    ids=["the command line", "values and their tables"],
)
def test_nothing_heavy_is_imported_before_a_command_needs_it(modules: list[str]) -> None:
    assert not loaded_by(f"import {', '.join(modules)}") & HEAVY


def test_the_package_shows_the_promised_names_and_imports_them_on_first_use() -> None:
    assert set(prunecli.__all__) == set(dir(prunecli)) == PUBLIC
    assert all(getattr(prunecli, name) for name in PUBLIC)
    assert not loaded_by("import prunecli; dir(prunecli)") & HEAVY


def imported(path: Path) -> set[str]:
    """Every module that a file imports, as it is written there, and each name it takes from one."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def test_no_test_file_is_imported_by_another_file() -> None:
    """What two test files need lies in ``toys`` or is a fixture of ``conftest.py``."""
    tests = {path.stem for path in TESTS.rglob("test_*.py")}
    for path in TESTS.rglob("*.py"):
        names = imported(path)
        assert not [name for name in names if name.startswith((".", "tests."))], path
        assert not [name for name in names if tests & set(name.split("."))], path


def test_every_wing_of_the_package_has_its_folder_of_tests() -> None:
    wings = {path.parent.name for path in Path(prunecli.__file__).parent.glob("*/__init__.py")}
    assert {wing for wing in wings if not list((TESTS / wing).rglob("test_*.py"))} == set()
