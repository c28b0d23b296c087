"""One architecture of every module of timm, from trace to reload: what the shipped matrix says still holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm

from benchmarks.coverage.trial import reload_difference, structure_digest, try_architecture
from prunecli.models.build import build
from prunecli.values.plan import ModelRef
from prunecli.values.support_matrix import Row, stored_matrix

# Smaller images for those that would take minutes: the structure stays the same.
SMALLER: dict[str, dict[str, Any]] = {
    "convmixer": {"input_size": (3, 64, 64)},
    "hieradet_sam2": {"input_size": (3, 224, 224)},
}


def tried(name: str, out: Path, **settings: Any) -> Row:
    row = try_architecture(name, out=out, **settings)
    return row.model_copy(update={"reload_max_abs_diff": reload_difference(out)})


@pytest.mark.slow
@pytest.mark.parametrize("shipped", stored_matrix().smallest_of_modules(), ids=lambda row: f"{row.module}:{row.name}")
def test_what_the_matrix_says_holds(shipped: Row, tmp_path: Path):
    if not timm.is_model(shipped.name):
        pytest.skip(f"timm {timm.__version__} has no {shipped.name}")
    found = tried(shipped.name, tmp_path, **{"model_args": shipped.model_args, **SMALLER.get(shipped.module, {})})
    assert (found.status, found.reason if found.status == "refused" else "") == (
        shipped.status,
        shipped.reason if shipped.status == "refused" else "",
    )
    assert found.prunable_share == pytest.approx(shipped.prunable_share, abs=0.02)
    assert found.structure == shipped.structure


def plain(name: str, **args: Any):
    return build(ModelRef(name=name, args=args, num_classes=10, timm=timm.__version__))


def test_structures_ignore_sizes_and_repetitions_only():
    base = structure_digest(plain("resnet18"))
    assert structure_digest(plain("resnet34")) == base
    assert structure_digest(plain("resnet18d")) != base
    assert structure_digest(plain("resnet50")) != base
    assert structure_digest(plain("vit_tiny_patch16_224")) == structure_digest(plain("vit_small_patch16_224", depth=3))
    assert structure_digest(plain("vit_tiny_patch16_224")) != structure_digest(
        plain("vit_tiny_patch16_224", qk_norm=True)
    )
    assert re.fullmatch(r"[0-9a-f]{12}", base)


def test_a_trial_reports_what_it_found(tmp_path: Path):
    row = tried("test_vit", tmp_path)
    assert row.status == "exact"
    assert row.module == "vision_transformer"
    assert [trial.target for trial in row.trials] == ["ratio=0.5", "macs=50%"]
    assert row.trials[1].macs == pytest.approx(row.macs / 2, rel=0.01)
    assert row.trials[1].params is not None
    assert row.trials[1].params < row.params
    assert row.frozen[0].params == 1000  # the bias of the classifier


def test_a_refusal_is_a_row_and_no_exception(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("prunecli.planning.prove.EQUIVALENCE_TOLERANCE", -1.0)
    row = tried("lenet5_linear", tmp_path)
    assert row.status == "refused"
    assert "cannot be pruned correctly" in row.reason
    assert row.reload_max_abs_diff is None
