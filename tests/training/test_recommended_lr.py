"""Each learning-rate rule with a case on both sides of its limit."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from prunecli.recipe.settings import FinetuneSettings
from prunecli.training.objective import distillation_loss
from prunecli.training.recommended_lr import distillation_gain, recommend_lr
from prunecli.training.retraining_rates import RemovedWeights, prescribed_lr
from prunecli.values.learning_rate import FinetuneSituation, LRReport

# What version 0.1 wrote for some situations: "asked" are the arguments, "report" the JSON.
STORED = json.loads((Path(__file__).parent / "golden" / "lr_reports.json").read_text(encoding="utf-8"))
RULED = [case for case in STORED if "optimizer" in case["asked"]]
PRESCRIBED = [case for case in STORED if "schedule" in case["asked"]]


def ask(**changes: Any) -> LRReport:
    inputs: dict[str, Any] = {
        "optimizer": "sgd",
        "epochs": 10,
        "batch_size": 128,
        "small_images": True,
        "removed_channels": 0.5,
        "removed_params": 0.5,
    }
    return recommend_lr(**(inputs | changes))


def fired(report: LRReport) -> list[str]:
    return [rule.name for rule in report.rules]


def test_sgd_starts_at_a_tenth_of_the_bases_peak() -> None:
    assert ask().recommended == pytest.approx(1e-2)
    assert "assumed" in ask().rule
    recorded = ask(base_peak_lr=0.4)
    assert recorded.recommended == pytest.approx(4e-2)
    assert "assumed" not in recorded.rule
    assert fired(recorded) == ["peak", "damage", "end"]


@pytest.mark.parametrize(
    ("removed", "expected"),
    [(0.0, 1e-3), (0.05, 1e-3), (0.10, 1e-3), (0.11, 1e-2), (0.3, 1e-2), (0.5, 1e-2), (0.95, 1e-2)],
)
def test_little_damage_takes_a_smaller_rate(removed: float, expected: float) -> None:
    assert ask(removed_channels=removed).recommended == pytest.approx(expected)


@pytest.mark.parametrize(
    ("steps", "removed", "expected"),
    [
        (40, 0.5, 0.0085),  # 0.03 * sqrt(40 / 500)
        (125, 0.75, 0.021),  # 0.03 * sqrt(125 / 250)
        (250, 0.75, 0.03),
        (500, 0.5, 0.03),
        (10_000, 0.3, 0.03),
        (40, 1.0, 0.03),
    ],
)
def test_a_short_fine_tuning_takes_the_rate_it_can_anneal(steps: int, removed: float, expected: float) -> None:
    report = ask(steps=steps, removed_channels=removed)
    assert report.recommended == pytest.approx(expected)
    assert fired(report) == ["short", "end"]
    assert ("few to anneal" in report.rule) == (expected < 0.03)


@pytest.mark.parametrize(
    "beyond", [{"steps": 10_001}, {"steps": None}, {"small_images": False}, {"removed_channels": 0.1}]
)
def test_beyond_what_was_measured_the_published_rules_hold(beyond: dict[str, Any]) -> None:
    assert fired(ask(**({"steps": 600} | beyond))) == ["peak", "damage", "end"]


def test_damage_is_named_as_measured() -> None:
    assert "30%" in ask(removed_channels=0.3).rule
    assert "matters little" in ask(removed_channels=0.3).rule
    assert "recover less" in ask(removed_channels=0.31).rule


@pytest.mark.parametrize(("small", "expected"), [(True, 1e-4), (False, 1e-5)])
def test_the_end_follows_the_image_size(small: bool, expected: float) -> None:
    assert ask(small_images=small).final_lr == pytest.approx(expected)


@pytest.mark.parametrize(
    ("case", "expected"), [({"removed_channels": 0.0, "base_peak_lr": 1e-3}, 1e-7), ({"optimizer": "adamw"}, 1.25e-6)]
)
def test_a_small_rate_ends_at_a_hundredth_of_itself(case: dict[str, Any], expected: float) -> None:
    report = ask(**case)
    assert report.final_lr == pytest.approx(expected) == pytest.approx(report.recommended / 100)


def test_adamw_takes_no_pruning_rule() -> None:
    report = ask(optimizer="adamw", batch_size=256, small_images=False, removed_channels=0.05)
    assert report.recommended == pytest.approx(2.5e-4)
    assert fired(report) == ["adamw", "end"]
    assert "No published pruning rule" in report.rule
    assert ask(optimizer="adamw", base_peak_lr=2e-3).recommended == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("removed", "lost", "expected"),
    [
        (0.5, 1.0, 0.0014),  # 1e-3 / sqrt(0.5)
        (0.5, 0.05, 7.1e-5),
        (0.5, 0.0, 4.2e-5),  # as if 3 % were lost
        (0.9, 0.5, 0.0016),
        (0.99, 0.5, 0.0016),  # as if 90 % were removed
    ],
)
@pytest.mark.parametrize("steps", [40, 1000])
def test_a_short_fine_tuning_by_adamw_goes_by_the_damage(
    steps: int, removed: float, lost: float, expected: float
) -> None:
    asked = {"optimizer": "adamw", "steps": steps, "removed_channels": removed, "lost_top1": lost}
    report = ask(**asked)
    assert report.recommended == pytest.approx(expected)
    assert fired(report) == ["short", "end"]
    assert candidates(report) == {"short": (expected, True), "published": (pytest.approx(1.25e-4), False)}
    assert report.final_lr == pytest.approx(expected / 100)
    taught = ask(**asked, distill_share=0.9, distill_temperature=4.0)
    assert taught.recommended == pytest.approx(expected * 3.7**0.5, rel=0.05)
    assert "less noisy" in taught.rule
    assert ("less than 3%" in report.rule) == (lost < 0.03)


@pytest.mark.parametrize(
    "case",
    [
        {"steps": 1001},
        {"steps": None},
        {"small_images": False},
        {"removed_channels": 0.1},
        {"from_scratch": True},
        {"lost_top1": None},
    ],
)
def test_adamw_keeps_the_published_rate_where_nothing_was_measured(case: dict[str, Any]) -> None:
    report = ask(**({"optimizer": "adamw", "steps": 100, "lost_top1": 0.5} | case))
    assert report.recommended == pytest.approx(1.25e-4)
    assert candidates(report)["published"] == (report.recommended, True)


def test_evidence_holds_every_input_and_names_papers() -> None:
    inputs = {"narrowest_width": 3, "jsv_ratio": 0.01, "lost_top1": 0.2, "epochs": 7}
    report = ask(**inputs)
    assert (inputs | {"removed_params": 0.5}).items() <= report.inputs.model_dump().items()
    assert all("arXiv" in rule.source for rule in report.rules)
    assert "lr_regret" in ask(steps=600).rules[0].source
    assert LRReport.model_validate(json.loads(json.dumps(report.model_dump(mode="json")))) == report


@pytest.mark.parametrize(
    "wrong",
    [
        {"removed_channels": 1.2},
        {"removed_params": -0.1},
        {"lost_top1": -0.1},
        {"batch_size": 0},
        {"steps": 0},
        {"base_peak_lr": 0.0},
    ],
)
def test_impossible_measurements_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ask(**wrong)


def candidates(report: LRReport) -> dict[str, tuple[float | None, bool]]:
    return {each.name: (each.lr, each.taken) for each in report.candidates}


def test_candidates_stand_side_by_side_and_the_taken_one_is_the_recommendation() -> None:
    short = ask(steps=40)
    assert candidates(short) == {"short": (0.0085, True), "published": (0.01, False), "smaller": (0.001, False)}
    assert candidates(ask(steps=20_000)) == {"short": (None, False), "published": (0.01, True)}
    assert candidates(ask(optimizer="adamw")) == {"short": (None, False), "published": (pytest.approx(1.25e-4), True)}
    for report in (short, ask(steps=20_000), ask(small_images=False), ask(optimizer="adamw"), ask(removed_channels=0)):
        (taken,) = (lr for lr, is_taken in candidates(report).values() if is_taken)
        assert taken == report.recommended


@pytest.mark.parametrize(
    ("case", "is_quoted"),
    [
        ({}, True),
        ({"base_peak_lr": 0.1}, True),  # the same rate
        ({"base_peak_lr": 0.5}, False),
        ({"optimizer": "adamw"}, True),
        ({"optimizer": "adamw", "batch_size": 512}, False),
    ],
)
def test_what_was_measured_is_quoted_of_the_rates_it_was_measured_of(case: dict[str, Any], is_quoted: bool) -> None:
    report = ask(**({"steps": 40, "lost_top1": 0.5} | case))
    reasons = {candidate.name: candidate.reason for candidate in report.candidates}
    assert ("points below the best" in reasons["published"]) == is_quoted
    assert "points below the best" in reasons["short"]
    assert ("not depend on the base's own rate" in report.rule) == ("base_peak_lr" in case)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"steps": 10_001}, "10001 steps are more than"),
        ({"steps": None}, "not known without data"),
        ({"small_images": False}, "up to 64 px only"),
        ({"removed_channels": 0.1}, "more than 10%"),
        ({"optimizer": "adamw"}, "accuracy of a dense model that knows the data"),
    ],
)
def test_why_a_candidate_does_not_hold_is_said(case: dict[str, Any], reason: str) -> None:
    assert reason in ask(**({"steps": 600} | case)).candidates[0].reason


def test_random_weights_are_trained_at_the_usual_peak() -> None:
    report = ask(from_scratch=True, steps=40)
    assert (report.recommended, fired(report)) == (0.1, ["scratch", "end"])
    assert candidates(report) == {"usual peak": (0.1, True)}
    assert fired(ask(from_scratch=True, optimizer="adamw")) == ["adamw", "end"]


def test_distillation_takes_a_rate_as_much_smaller_as_it_pulls_harder() -> None:
    alone = ask(steps=600)
    taught = ask(steps=600, distill_share=0.9, distill_temperature=4.0)
    assert (alone.recommended, taught.recommended) == (0.03, pytest.approx(0.016))  # 0.03 / sqrt(0.1 + 0.9 * 4)
    assert "by 1.9 " in taught.rule
    assert "Distillation" not in alone.rule
    assert ask(steps=20_000, distill_share=0.9, distill_temperature=4.0).recommended == pytest.approx(0.01)


@pytest.mark.parametrize(("optimizer", "name"), [("sgd", "SGD"), ("adamw", "AdamW")])
def test_what_is_quoted_was_measured_with_a_teacher_where_there_is_one(optimizer: str, name: str) -> None:
    teacher = {"distill_share": 0.9, "distill_temperature": 4.0}
    for changes, expected in ((teacher, f"cases of {name}, with a teacher"), ({}, f"cases of {name}")):
        weighed = ask(optimizer=optimizer, steps=40, lost_top1=0.5, **changes).candidates
        assert all(candidate.reason.endswith(expected) for candidate in weighed)


def test_the_gradient_of_distillation_stays_within_the_upper_end_of_its_gain() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (10 * torch.randn(64, 10, generator=generator) for _ in range(2))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(64 * distillation_loss(student, teacher, temperature=4.0), student)
    expected = 4 * ((student / 4).softmax(1) - (teacher / 4).softmax(1))
    torch.testing.assert_close(gradient, expected.detach())
    assert float(gradient.abs().max()) <= distillation_gain(1.0, 4.0) ** 2


def text(report: LRReport) -> str:
    """The JSON as ``report.json`` and ``prunecli lr --json`` have it."""
    return json.dumps(report.model_dump(mode="json"))


@pytest.mark.parametrize("case", RULED, ids=lambda case: case["case"])
def test_the_json_of_a_recommendation_stays_as_it_was(case: dict[str, Any]) -> None:
    assert text(recommend_lr(**case["asked"])) == json.dumps(case["report"])


@pytest.mark.parametrize("case", PRESCRIBED, ids=lambda case: case["case"])
def test_the_json_of_a_prescribed_rate_stays_as_it_was(case: dict[str, Any]) -> None:
    asked = case["asked"]
    settings = FinetuneSettings(schedule=asked["schedule"], original=asked["original"])
    removed = RemovedWeights(**{key: asked[key] for key in ("sparsity", "norm_dense", "norm_pruned")})
    found = prescribed_lr(settings, epochs=asked["epochs"], removed=removed)
    assert found is not None
    assert text(found) == json.dumps(case["report"])


@pytest.mark.parametrize("case", STORED, ids=lambda case: case["case"])
def test_a_stored_report_is_read_and_written_unchanged(case: dict[str, Any]) -> None:
    report = LRReport.model_validate(case["report"])
    assert text(report) == json.dumps(case["report"])
    assert LRReport.model_validate_json(report.model_dump_json()) == report


def test_a_report_of_an_earlier_version_gains_no_measurements() -> None:
    """The first reports had neither steps nor teacher nor candidates: their defaults would be statements."""
    stored = ask().model_dump(mode="json")
    evidence = stored["evidence"]
    for key in ("steps", "lost_top1", "from_scratch", "distill_share", "distill_temperature", "candidates"):
        del evidence[key]
    report = LRReport.model_validate(stored)
    assert text(report) == json.dumps(stored)
    assert list(report.measurements()) == [key for key in evidence if key != "rules"]


@pytest.mark.parametrize("broken", [{"colour": "red"}, {"rules": [None]}, {"rules": 3}, {"candidates": {"name": "a"}}])
def test_evidence_of_another_shape_is_refused(broken: dict[str, Any]) -> None:
    stored = ask().model_dump(mode="json")
    stored["evidence"] |= broken
    with pytest.raises(ValidationError):
        LRReport.model_validate(stored)


def test_the_front_takes_every_field_of_the_situation() -> None:
    parameters = inspect.signature(recommend_lr).parameters
    assert list(parameters) == list(FinetuneSituation.model_fields)
    fields = FinetuneSituation.model_fields
    defaults = {name: field.default for name, field in fields.items() if not field.is_required()}
    assert {name: each.default for name, each in parameters.items() if each.default is not each.empty} == defaults
    assert ask().inputs.model_fields_set == set(parameters), "what is not given is not written"
