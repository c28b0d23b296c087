"""What auto keeps: the rule by hand, and whole stages on a toy job."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image
from torch import nn

from prunecli.errors import UsageError
from prunecli.measure.accuracy import halves_chance_error, lost_top1
from prunecli.recipe import packaged
from prunecli.recipe.layers import layered
from prunecli.recipe.recipe import Recipe
from prunecli.recovery import choose
from prunecli.recovery.choose import CANDIDATES, candidates_for, compare, recover_stage
from prunecli.recovery.steps import RecoveryResult
from prunecli.run import plan_and_prove
from prunecli.run.job import open_job
from prunecli.run.recovery_context import recovery_context
from prunecli.surgery.cut import cut
from prunecli.training.probe import calibrated_losses
from toys.jobs import JOB, call


def test_a_gain_counts_beyond_two_standard_errors_and_one_percent():
    without = (1.0, 2.0, 3.0, 2.0)

    def lower(*by: float) -> list[float]:
        return [loss - gain for loss, gain in zip(without, by, strict=True)]

    sure = compare(without, lower(0.5, 0.5, 0.5, 0.5))
    assert (sure.without, sure.with_it, sure.error) == (2.0, 1.5, 0.0)
    assert sure.better
    assert not compare(without, lower(0.019, 0.019, 0.019, 0.019)).better, "below 1 % of 2"
    assert compare(without, lower(0.021, 0.021, 0.021, 0.021)).better
    unsure = compare(without, lower(0, 2, 0, 0))
    assert unsure.error == pytest.approx(1.0 / 2)  # the differences' deviation is 1
    assert not unsure.better, "0.5 is one standard error"
    assert not compare(without, without).better


def test_a_trial_that_diverged_never_wins_and_any_other_beats_it():
    fine, lost = (1.0, 1.5), (math.inf, math.nan)
    assert not compare(fine, lost).better
    assert compare(lost, fine).better
    assert not compare(lost, lost).better


def test_the_calibrated_loss_forgives_being_too_sure():
    """Right three times of four, sure of a million to one: the best temperature says so; plain it would cost 3.5."""
    logits = torch.zeros(4, 2, dtype=torch.float64)
    logits[:, 0] = 14
    labels = torch.tensor([0, 0, 0, 1])
    losses = calibrated_losses(logits, labels)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(losses.mean()) == pytest.approx(entropy, rel=1e-2)
    assert nn.functional.cross_entropy(logits, labels) > 3
    assert torch.isinf(calibrated_losses(torch.full((2, 2), math.nan), torch.tensor([0, 1]))).all()


def test_without_batch_norm_no_candidate_needs_it():
    assert candidates_for(nn.BatchNorm2d(2)) == CANDIDATES
    assert candidates_for(nn.Linear(2, 2)) == (
        ("lstsq",), ("onepass",), ("lstsq", "onepass"), ("lstsq", "blend"), ("blend",), ("orthp",)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": ["auto", "bn"]}, "stands alone"),
        ({"steps": ["orthp", "lstsq"]}, "put it first"),
        ({"steps": ["lstq"]}, "steps"),
        ({"blend": 1.5}, "blend"),
        ({"ridge": -1}, "ridge"),
        ({"lstsq_images": 256}, "data.calibration_images"),
        ({"steps": ["bn", "onepass"]}, "put it first"),
    ],
)
def test_wrong_combinations_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        Recipe.from_mapping({"recover": settings})


@pytest.mark.slow
def test_named_steps_are_applied_in_turn_and_said(tmp_path):
    """LeNet-5 has biases and no BatchNorm; its first linear layer reads a flattened feature map."""
    job = [*JOB, "--epochs=0", "--criterion=l1"]
    done = call("compress", *job, "--recover=lstsq,blend,repair", f"--out={tmp_path / 'run'}")
    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    lstsq, blend, repair = report["recovery"]
    assert lstsq["rule"] == "asked for in the recipe: 4 layers solved from 192 images"
    assert blend["rule"] == "asked for in the recipe"
    assert repair["rule"].startswith("asked for in the recipe: 5 layers repaired, 0 of them in the BatchNorm behind")
    assert lstsq["loss_after"] == blend["loss_before"] != blend["loss_after"] == repair["loss_before"]
    assert blend["jsv_after"]["condition"] != blend["jsv_before"]["condition"]


@pytest.mark.parametrize("step", ["lstsq", "repair", "bn"])
def test_steps_that_look_at_images_need_data(tmp_path, step):
    done = call("compress", "lenet5_relu", "--no-pretrained", "--target=ratio=0.5", f"--recover={step}",
                f"--out={tmp_path / 'run'}")  # fmt: skip
    assert done.exit_code == 2
    assert f"Recovery step {step}" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_every_start_is_probed_at_the_rate_that_its_own_damage_asks_for(tmp_path):
    recipe = Recipe.from_mapping(layered(packaged.read("quickstart"), {"recover": {"probe_steps": 1}}))
    job = open_job("compress", recipe, out=tmp_path / "run", resume=False, force=False, notify=lambda _: None)
    with job.closing:
        job.begin()
        dense = job.source.model
        plan = plan_and_prove.plan_and_prove(job.source, recipe, job.images)[0].plan
        damages: list[float | None] = []

        def rate(lost: float | None) -> float:
            damages.append(lost)
            return 0.001 * len(damages)

        context = recovery_context(job, dense, plan)
        rows = {row.name: row for row in recover_stage(context, cut(dense, plan), rate)[1]}
    tried = {name: row for name, row in rows.items() if "at LR" in row.rule}
    assert len(tried) == 4
    assert sum("blend" in name or "orthp" in name for name in tried) == 1
    *candidates, plain, again = damages[:6]  # in the order of the rows, then plain pruning twice
    assert plain == again
    assert plain is not None
    assert plain > 0.9, "the cut alone leaves the digits net guessing"
    top1 = [row.top1_after for row in tried.values()]
    assert sorted(candidates, reverse=True) == [lost for _, lost in sorted(zip(top1, candidates, strict=True))]
    assert min(candidates) < 0.1
    kept = next(row for row in rows.values() if row.kept)
    assert kept.kl_after < kept.kl_before
    for place, row in enumerate(tried.values()):
        assert f"at LR {0.001 * (place + 1 if 'did better' in row.rule else 7):g}" in row.rule


@pytest.mark.parametrize(
    ("dense", "now", "classes", "expected"),
    [
        (91.0, 50.5, 10, 0.5),  # 40.5 of 81 points above guessing
        (91.0, 92.0, 10, 0.0),
        (91.0, 8.0, 10, 1.0),
        (90.0, 70.0, 2, 0.5),
        (55.0, 20.0, 10, None),  # half of guessing's mistakes
        (55.1, 10.0, 10, 1.0),
    ],
)
def test_what_a_cut_cost_counts_from_guessing(dense, now, classes, expected):
    assert lost_top1(dense, now, classes=classes) == (None if expected is None else pytest.approx(expected))
    assert halves_chance_error(dense, classes) == (expected is not None)


def state(*kl: float) -> choose._State:
    return choose._State(kl=kl, labelled=None)


def candidate(name: str, *kl: float) -> choose._Candidate:
    return choose._Candidate(steps=(name,), recovered=RecoveryResult(model=nn.Identity()), state=state(*kl))


def test_when_the_favourite_does_not_hold_the_runner_up_gets_its_turn():
    """Even images rank, odd ones confirm: the favourite was lucky on the even ones."""
    plain = candidate("", 2, 2, 2.1, 2.1, 1.9, 1.9)
    lucky, solid = candidate("lucky", 0, 3, 0, 3, 0, 3), candidate("solid", 1, 1, 1.1, 1.1, 1, 1)
    kept, verdicts = choose._first_that_holds(
        plain, [solid, lucky], lambda one: choose._answers_better(plain, one, half=True)
    )
    assert kept is solid
    assert list(verdicts) == ["lucky", "solid"]
    assert verdicts["solid"].startswith("KL from the dense model 1.03 against 2 ")
    held, _ = choose._first_that_holds(plain, [lucky], lambda one: choose._answers_better(plain, one, half=True))
    assert held is plain


def test_one_image_far_off_does_not_hide_that_all_others_gained():
    plain = candidate("", *[0.2, 0.2, 0.3, 0.3] * 7, 9, 9)
    better = candidate("better", *[0.05, 0.05, 0.06, 0.06] * 7, 1, 1)
    assert not choose.compare(plain.state.kl[1::2], better.state.kl[1::2]).better
    assert choose._answers_better(plain, better, half=True)[0]
    mixed = candidate("mixed", *[0.05, 0.05, 0.06, 0.06] * 7, 99, 99)
    assert not choose._answers_better(plain, mixed, half=True)[0], "its mean is worse"


@pytest.mark.slow
def test_without_labels_the_nearest_answers_win_and_no_label_is_read(tmp_path):
    """Photographs without classes: nothing is fine-tuned, and every candidate is judged by its answers."""
    for at in range(24):
        noise = torch.randint(0, 256, (28, 28, 3), generator=torch.Generator().manual_seed(at), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{at}.png")
    done = call("compress", "lenet5_relu", "--no-pretrained", "--target=ratio=0.5", f"--out={tmp_path / 'run'}",
                f"data.calibration={tmp_path}", "--json")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["recovery"]
    assert {row["name"] for row in rows} == {"+".join(steps) for steps in candidates_for(nn.Linear(2, 2))}
    assert all(row["loss_after"] is None for row in rows)
    (kept,) = (row for row in rows if row["kept"])
    assert kept["kl_after"] < kept["kl_before"]
