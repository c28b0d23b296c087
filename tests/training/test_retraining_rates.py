"""Rates that a retraining schedule prescribes, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from prunecli.errors import UsageError
from prunecli.recipe.settings import FinetuneSettings
from prunecli.training.retraining_rates import RemovedWeights, adaptive_peak, prescribed_lr
from prunecli.values.learning_rate import LRReport, PrescribedSchedule


def peak(**changes: Any) -> float:
    # ||W|| = 5 and ||W_p|| = 4, so 3/5 of the norm left with a quarter of the parameters would be 0.6 / 0.5 > 1
    cut = {"norm_dense": 5.0, "norm_pruned": 4.0, "sparsity": 0.25}
    removed = RemovedWeights(**{key: changes.pop(key, value) for key, value in cut.items()})
    return adaptive_peak(removed, **({"peak": 0.1, "epochs": 10, "original_epochs": 200} | changes))


def test_adaptive_peak_by_hand() -> None:
    assert peak(sparsity=0.64) == pytest.approx(0.1 * 0.6 / 0.8)
    assert peak(norm_pruned=4.9, sparsity=0.81) == pytest.approx(0.1 * (0.99**0.5 / 5) / 0.9)


def test_adaptive_peak_stays_between_the_budgets_share_and_the_bases_peak() -> None:
    assert peak() == 0.1
    assert peak(norm_pruned=5.0) == pytest.approx(0.1 * 10 / 200)
    assert peak(norm_pruned=5.0, epochs=400) == 0.1


def test_without_a_cut_there_is_no_adaptive_peak() -> None:
    for wrong in ({"sparsity": 0.0}, {"sparsity": 1.0}, {"norm_dense": 0.0}, {"epochs": 0}, {"peak": 0.0}):
        with pytest.raises(ValueError, match="must"):
            peak(**wrong)


def ask(name: str, *, epochs: int = 50, sparsity: float = 0.64, **original: Any) -> LRReport | None:
    settings = FinetuneSettings(schedule=name, original={"lr": 0.1, "epochs": 200, **original})
    removed = RemovedWeights(sparsity=sparsity, norm_dense=5.0, norm_pruned=4.0)
    return prescribed_lr(settings, epochs=epochs, removed=removed)


def test_allr_says_its_numbers() -> None:
    found = ask("allr")
    assert found is not None
    assert found.recommended == pytest.approx(0.075)
    read = found.inputs
    assert isinstance(read, PrescribedSchedule)
    assert (read.norm_dense, read.norm_pruned, read.sparsity) == (5.0, 4.0, 0.64)
    assert read.norm_removed == pytest.approx(0.6, abs=1e-12)
    assert "60.0%" in found.rule
    assert [rule.name for rule in found.rules] == ["allr"]
    with pytest.raises(UsageError, match="only `compress` knows"):
        ask("allr", sparsity=0.0)


@pytest.mark.parametrize(
    ("epochs", "original", "expected"),
    [
        (101, {}, 0.1),
        (100, {}, 0.01),
        (50, {}, 0.001),
        (50, {"min_lr": 0.004}, 0.004),
        (100, {"schedule": "cosine", "min_lr": 0.02}, 0.06),
    ],
)
def test_rewinding_starts_where_the_original_was(epochs: int, original: dict[str, Any], expected: float) -> None:
    found = ask("rewind", epochs=epochs, **original)
    assert found is not None
    assert found.recommended == pytest.approx(expected)


def test_slr_and_clr_climb_to_the_bases_peak_and_others_leave_it_to_the_rules() -> None:
    for name in ("slr", "clr"):
        found = ask(name)
        assert found is not None
        assert found.recommended == 0.1
        assert "0.1" in found.rule
    removed = RemovedWeights(sparsity=0.5, norm_dense=1.0, norm_pruned=0.5)
    assert prescribed_lr(FinetuneSettings(), epochs=1, removed=removed) is None
