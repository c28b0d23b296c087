"""Optimiser choice and learning rates, against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from prunecli.errors import UsageError
from prunecli.recipe.settings import FinetuneSettings
from prunecli.training.optimizer import build_optimizer, optimizer_name
from prunecli.training.schedule import build_schedule


def rates(lr: float, *, epochs: int, steps: int, **settings: Any) -> list[float]:
    asked = FinetuneSettings(optimizer="sgd", **settings)
    schedule = build_schedule(asked, lr=lr, steps_per_epoch=steps, epochs=epochs)
    forward = [schedule(step) for step in range(epochs * steps)]
    assert forward == [schedule(step) for step in reversed(range(epochs * steps))][::-1]  # position is all
    return forward


def test_papers_stepped_schedule() -> None:
    found = rates(1e-2, epochs=120, steps=3, schedule="step")
    by_epoch = [1e-2] * 60 + [1e-3] * 30 + [1e-4] * 30
    assert found == pytest.approx([lr for lr in by_epoch for _ in range(3)])


def test_steps_stop_at_the_last_rate_asked_for() -> None:
    found = rates(1e-3, epochs=8, steps=1, schedule={"kind": "step", "milestones": (0.75, 0.5), "min_lr": 5e-5})
    assert found == pytest.approx([1e-3] * 4 + [1e-4] * 2 + [5e-5] * 2)


def test_cosine_starts_at_the_peak_and_ends_at_min_lr() -> None:
    found = rates(0.1, epochs=2, steps=5, schedule={"kind": "cosine", "min_lr": 0.02})
    assert found == pytest.approx([0.02 + 0.04 * (1 + math.cos(math.pi * t / 9)) for t in range(10)])
    assert found[-1] == 0.02


def test_a_peak_below_min_lr_is_not_raised() -> None:
    assert rates(1e-5, epochs=2, steps=2, schedule={"kind": "cosine", "min_lr": 1e-4}) == pytest.approx([1e-5] * 4)


def test_warmup_is_linear_and_the_first_step_counts() -> None:
    found = rates(0.4, epochs=2, steps=4, schedule={"kind": "constant", "warmup_epochs": 1.0})
    assert found == pytest.approx([0.1, 0.175, 0.25, 0.325, 0.4, 0.4, 0.4, 0.4])
    cosine = rates(0.4, epochs=2, steps=4, schedule={"kind": "cosine", "warmup_epochs": 1.0, "min_lr": 0.0})
    assert cosine == pytest.approx([0.1, 0.175, 0.25, 0.325, 0.4, 0.3, 0.1, 0.0], abs=1e-12)


def test_warmup_longer_than_the_run_leaves_one_step() -> None:
    assert len(rates(0.4, epochs=1, steps=2, schedule={"kind": "cosine", "warmup_epochs": 9.0})) == 2


ORIGINAL = {"lr": 0.1, "epochs": 8, "milestones": [0.5, 0.75]}


def test_rewinding_replays_the_end_of_the_original_steps() -> None:
    found = rates(0.7, epochs=5, steps=2, schedule="rewind", original=ORIGINAL)
    assert found == pytest.approx([0.1] * 2 + [0.01] * 4 + [0.001] * 4)  # epochs 4 to 8 of 8; the 0.7 is not read
    whole = rates(0.1, epochs=8, steps=2, schedule="step")
    assert found == pytest.approx(whole[6:])


def test_rewinding_replays_the_end_of_the_original_cosine() -> None:
    original = {"lr": 0.4, "epochs": 3, "schedule": "cosine", "min_lr": 0.1}
    found = rates(0.4, epochs=1, steps=3, schedule="rewind", original=original)
    assert found == pytest.approx([0.1 + 0.15 * (1 + math.cos(math.pi * t / 8)) for t in (6, 7, 8)])


def test_rewinding_further_than_there_is_says_so() -> None:
    with pytest.raises(UsageError, match="cannot replay 9 epochs of a schedule that had 8"):
        rates(0.1, epochs=9, steps=1, schedule="rewind", original=ORIGINAL)


def test_slr_climbs_a_tenth_and_drops_twice_in_the_rest() -> None:
    found = rates(0.1, epochs=4, steps=10, schedule="slr", original=ORIGINAL)
    # 40 steps: 4 up from 1e-3 by half a cosine (at a quarter: sin^2 of an eighth of pi), then 18, 9 and 9
    quarter = math.sin(math.pi / 8) ** 2
    climb = [0.001, 0.001 + 0.099 * quarter, 0.0505, 0.1 - 0.099 * quarter]
    assert found == pytest.approx(climb + [0.1] * 18 + [0.01] * 9 + [0.001] * 9)


def test_clr_is_torchs_one_cycle() -> None:
    found = rates(0.2, epochs=3, steps=10, schedule="clr", original=ORIGINAL)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.2, total_steps=30, pct_start=4 / 30, div_factor=100, final_div_factor=100, cycle_momentum=False
    )  # torch's peak is at step pct_start * total - 1 = 3, ours behind the first tenth
    expected = []
    for _ in range(30):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cycle.step() if len(expected) < 30 else None
    assert found == pytest.approx(expected)
    assert (found[0], found[3], found[-1]) == pytest.approx((2e-3, 0.2, 2e-5))


def test_allr_climbs_from_nothing_and_falls_in_a_line() -> None:
    found = rates(0.08, epochs=2, steps=10, schedule="allr", original=ORIGINAL)
    assert found == pytest.approx([0.0, 0.04, *(0.08 * left / 18 for left in range(18, 0, -1))])


@pytest.mark.parametrize("name", ["rewind", "slr", "clr", "allr"])
def test_a_single_step_has_a_rate(name: str) -> None:
    (found,) = rates(0.1, epochs=1, steps=1, schedule=name, original={"lr": 0.1, "epochs": 1})
    assert 1e-3 < found <= 0.1


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)], "sgd"),
        ([nn.LayerNorm(2), nn.BatchNorm2d(2)], "sgd"),
        ([nn.Linear(2, 2)], "sgd"),
        ([nn.Linear(2, 2), nn.LayerNorm(2)], "adamw"),
        ([nn.Linear(2, 2), nn.RMSNorm(2)], "adamw"),
    ],
)
def test_optimizer_follows_the_norm(layers: list[nn.Module], expected: str) -> None:
    model = nn.Sequential(*layers)
    assert optimizer_name(FinetuneSettings(), model) == expected
    assert optimizer_name(FinetuneSettings(optimizer="adamw"), model) == "adamw"


def test_momentum_and_decay_are_as_asked() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    for nesterov in (False, True):
        settings = FinetuneSettings(nesterov=nesterov, momentum=0.8, weight_decay=0.01)
        optimizer = build_optimizer(model, settings, lr=0.1)
        assert isinstance(optimizer, torch.optim.SGD)
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert [decays[id(p)] for p in model.parameters()] == [0.01, 0.0, 0.0, 0.0]
        assert {group["nesterov"] for group in optimizer.param_groups} == {nesterov}
        assert {group["momentum"] for group in optimizer.param_groups} == {0.8}
        papers = build_optimizer(model, settings.updated(decay_norms=True), lr=0.1)
        assert {group["weight_decay"] for group in papers.param_groups} == {0.01}
        assert sum(len(group["params"]) for group in papers.param_groups) == 4
    adamw = build_optimizer(model, FinetuneSettings(optimizer="adamw", momentum=0.8), lr=0.1)
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.9, 0.999)


def test_nesterov_without_momentum_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nesterov"):
        build_optimizer(nn.Linear(2, 2), FinetuneSettings(nesterov=True, momentum=0.0), lr=0.1)
