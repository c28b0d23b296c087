"""Fine-tuning: what it computes, that it resumes bit for bit, and how it fails."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunecli.data.images import open_data
from prunecli.errors import InterruptedRunError, PruneError, UsageError
from prunecli.interrupts import Stopped, stop_if_asked, stop_requests
from prunecli.measure.accuracy import evaluate
from prunecli.measure.batch_norm import recalibrate_bn_
from prunecli.models import paper_nets
from prunecli.models.build import input_spec
from prunecli.models.load import load_model
from prunecli.recipe.settings import DataSettings, DistillSettings, FinetuneSettings
from prunecli.training import checkpoint
from prunecli.training.penalty import Orthogonality
from prunecli.training.probe import ProbeResult, probe_loss
from toys.training import ADAMW, CPU, CSKD, DLB, PSKD, RUN, SGD, Interrupting, ToyImages, same, toy_net, tune, weights

PLAIN = FinetuneSettings(optimizer="sgd", schedule="constant", weight_decay=0.0)


def figures(report: Any) -> list[dict[str, float]]:
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in report.history]


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------- evaluation


class Answers(nn.Module):
    """Images are the logits already."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_evaluate_by_hand() -> None:
    logits = torch.tensor([[4.0, 3, 2, 1, 0, -1], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    labels = torch.tensor([0, 0, 4])
    found = evaluate(Answers(), [(logits[:2], labels[:2]), (logits[2:], labels[2:])], device=CPU)
    assert found.samples == 3
    assert found.top1 == pytest.approx(100 / 3)
    assert found.top5 == pytest.approx(200 / 3)
    assert found.loss == pytest.approx(float(functional.cross_entropy(logits.double(), labels)), rel=1e-12)


def test_evaluate_has_no_top5_below_five_classes_and_puts_modes_back() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Dropout(0.9))
    model[1].eval()
    found = evaluate(model, [(torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.long))], device=CPU)
    assert found.top5 is None
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_evaluate_refuses_an_empty_split() -> None:
    with pytest.raises(PruneError, match="no image"):
        evaluate(Answers(), [], device=CPU)


# -------------------------------------------------------------------------------------------------- the loop


def test_sgd_equals_a_loop_written_out() -> None:
    images = ToyImages()
    model = toy_net(dropout=0.0)
    twin = copy.deepcopy(model).train()
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for epoch in range(2):
        for inputs, labels in images.train_loader(epoch=epoch):
            loss = functional.cross_entropy(twin(inputs), labels)
            gradients = torch.autograd.grad(loss, list(twin.parameters()))
            with torch.no_grad():
                for (name, weight), gradient in zip(twin.named_parameters(), gradients, strict=True):
                    decay = 5e-4 * weight if weight.ndim > 1 else 0.0
                    velocity[name] = 0.9 * velocity[name] + gradient + decay
                    weight.sub_(0.02 * velocity[name])
    settings = FinetuneSettings(optimizer="sgd", schedule="constant")
    report = tune(model, images, settings, lr=0.02, epochs=2, device=CPU, seed=0)
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert report.steps == 24
    assert report.schedule == "constant"


def test_it_learns_and_reports_last_and_best() -> None:
    images, model, events = ToyImages(), toy_net(), []
    before = evaluate(model, images.val_loader(), device=CPU)
    settings = SGD.updated(schedule=SGD.schedule.updated(min_lr=1e-4))
    report = tune(model, images, settings, on_event=events.append, **(RUN | {"epochs": 5}))
    after = evaluate(model, images.val_loader(), device=CPU)
    assert after.top1 > before.top1 + 20
    assert report.best_top1 == after.top1 == max(entry["top1"] for entry in report.history)
    assert report.last_top1 == report.history[-1]["top1"]
    assert [entry["epoch"] for entry in report.history] == [1, 2, 3, 4, 5]
    assert report.history[-1]["lr"] == pytest.approx(1e-4)
    json.dumps(events)
    steps = [event for event in events if event["event"] == "step"]
    assert steps[-1]["step"] == steps[-1]["steps"] == 60
    assert steps[-1]["eta_seconds"] == 0
    assert sum(event["event"] == "epoch" for event in events) == 5


def test_the_average_is_exported_where_asked() -> None:
    settings = PLAIN.updated(ema=0.5)
    images, model, raw = ToyImages(), toy_net(), toy_net()
    trajectory: list[Tensor] = []
    handle = raw[5].register_forward_pre_hook(lambda *_: trajectory.append(raw[5].weight.detach().clone()))
    tune(raw, images, PLAIN, **(RUN | {"epochs": 1}))
    handle.remove()
    tune(model, images, settings, **(RUN | {"epochs": 1}))
    seen = [*trajectory[1 : images.steps_per_epoch], raw[5].weight.detach()]
    average = seen[0]
    for step, value in enumerate(seen[1:], start=1):
        average = average.lerp(value, 1 - min(0.5, 1 - (1 + step) ** (-2 / 3)))
    torch.testing.assert_close(model[5].weight.detach(), average)


def test_runs_repeat_and_leave_the_callers_random_state_alone() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        model = toy_net()
        torch.manual_seed(11)
        tune(model, ToyImages(), SGD, **RUN)
        results.append((weights(model), float(torch.rand(())), np.random.rand(), random.random()))  # noqa: NPY002
    torch.manual_seed(11)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    assert same(results[0][0], results[1][0])
    assert results[0][1:] == (float(torch.rand(())), np.random.rand(), random.random())  # noqa: NPY002


def test_bf16_trains_and_leaves_the_model_plain() -> None:
    model = toy_net()
    settings = SGD.updated(amp="bf16", channels_last="on")
    report = tune(model, ToyImages(), settings, **RUN)
    assert report.last_top1 is not None
    assert report.last_top1 > 50
    assert "forward" not in vars(model)
    assert all(parameter.dtype == torch.float32 and parameter.is_contiguous() for parameter in model.parameters())
    assert not model._forward_hooks


def test_distillation_pulls_towards_the_teacher() -> None:
    images, teacher, alone = ToyImages(), toy_net(), toy_net(dropout=0.0)
    tune(teacher, images, PLAIN, **(RUN | {"epochs": 8}))
    student = copy.deepcopy(alone)
    settings = PLAIN.updated(distill=DistillSettings(alpha=1.0, temperature=2.0))
    tune(alone, images, PLAIN, **RUN)
    before = weights(teacher)
    tune(student, images, settings, teacher=teacher, **RUN)
    inputs = images.val.tensors[0]

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model.eval()(inputs).softmax(1) - teacher.eval()(inputs).softmax(1)).abs().mean())

    assert distance(student) < distance(alone)
    assert same(before, weights(teacher))


def test_distillation_needs_a_teacher() -> None:
    settings = PLAIN.updated(distill=DistillSettings(alpha=0.5))
    with pytest.raises(UsageError, match="no dense model"):
        tune(toy_net(), ToyImages(), settings, **RUN)


@pytest.mark.parametrize("settings", [CSKD, PSKD, DLB])
def test_the_losses_that_learn_from_the_net_itself_train_it(settings: FinetuneSettings) -> None:
    images, model = ToyImages(), toy_net()
    report = tune(model, images, settings, **(RUN | {"epochs": 6}))
    assert report.last_top1 > 60
    plain = toy_net()
    tune(plain, images, settings.updated(loss="ce"), **(RUN | {"epochs": 6}))
    assert not same(weights(plain), weights(model))


# ----------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("name", "settings", "moment", "resumed_at"),
    [("sgd", SGD, "18", (1, 4)), pytest.param("adamw", ADAMW, "in-write", (1, 0), marks=pytest.mark.slow)],
)
def test_killed_run_resumes_to_the_same_bits(
    tmp_path: Path, name: str, settings: FinetuneSettings, moment: str, resumed_at: tuple[int, int]
) -> None:
    whole = toy_net()
    expected = tune(whole, ToyImages(), settings, **RUN)

    root = Path(__file__).parents[2]
    program = [sys.executable, str(root / "tests" / "toys" / "training.py"), str(tmp_path / "run"), name, moment]
    killed = subprocess.run(program, env={**os.environ, "PYTHONPATH": str(root)}, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL

    events: list[dict[str, Any]] = []
    model = toy_net()
    report = tune(model, ToyImages(), settings, folder=tmp_path / "run", on_event=events.append, **RUN)
    assert events[0] == {"event": "resume", "epoch": resumed_at[0], "step": resumed_at[1]}
    assert figures(report) == figures(expected)
    assert same(weights(model), weights(whole))
    assert states(tmp_path / "run") == ["state-00003-00000000.safetensors"]


@pytest.mark.parametrize(
    ("settings", "stop_at"),
    [(SGD, stop_at) for stop_at in range(1, 36, 5)]
    + [(settings, stop_at) for settings in (CSKD, PSKD, DLB) for stop_at in (12, 30)],
)
def test_interrupted_anywhere_resumes_to_the_same_bits(tmp_path: Path, settings: Any, stop_at: int) -> None:
    settings = settings.updated(checkpoint_every=None)
    whole = toy_net()
    tune(whole, ToyImages(), settings, **RUN)

    images = ToyImages()
    images.train = Interrupting(
        images.train, stop_at * images.batch_size * (2 if settings.loss.kind in ("cskd", "dlb") else 1)
    )
    with pytest.raises(InterruptedRunError, match="saved") as caught:
        tune(toy_net(), images, settings, folder=tmp_path, **RUN)
    assert caught.value.exit_code == 130
    model = toy_net()
    tune(model, ToyImages(), settings, folder=tmp_path, **RUN)
    assert same(weights(model), weights(whole))


def test_interrupted_in_validation_trains_no_step_twice(tmp_path: Path) -> None:
    images = ToyImages()
    images.val = Interrupting(images.val, 40)
    with pytest.raises(InterruptedRunError):
        tune(toy_net(), images, PLAIN, folder=tmp_path, **RUN)
    assert states(tmp_path) == ["state-00000-00000012.safetensors"]
    whole, model = toy_net(), toy_net()
    tune(whole, ToyImages(), PLAIN, **RUN)
    tune(model, ToyImages(), PLAIN, folder=tmp_path, **RUN)
    assert same(weights(model), weights(whole))


def test_interrupted_in_validation_the_epoch_still_reports_the_rate_of_its_last_step(tmp_path: Path) -> None:
    settings = FinetuneSettings(optimizer="sgd", schedule="cosine")
    images = ToyImages()
    images.val = Interrupting(images.val, 40)
    with pytest.raises(InterruptedRunError):
        tune(toy_net(), images, settings, folder=tmp_path, **RUN)
    resumed = tune(toy_net(), ToyImages(), settings, folder=tmp_path, **RUN)
    assert figures(resumed) == figures(tune(toy_net(), ToyImages(), settings, **RUN))


def test_a_stop_asked_for_at_the_very_end_is_heard(tmp_path: Path) -> None:
    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and event["epoch"] == event["epochs"]:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError):
        tune(toy_net(), ToyImages(), PLAIN, folder=tmp_path, on_event=interrupt, **RUN)
    assert states(tmp_path) == ["state-00003-00000000.safetensors"]


def test_a_stop_asked_for_too_late_to_be_heard_is_handed_on() -> None:
    handed: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, _: handed.append(number))
    try:
        with stop_requests():
            signal.raise_signal(signal.SIGTERM)
        with suppress(Stopped), stop_requests() as stop:
            signal.raise_signal(signal.SIGTERM)
            stop_if_asked(stop)
            pytest.fail("the request was not heard")
    finally:
        signal.signal(signal.SIGTERM, former)
    assert handed == [signal.SIGTERM]


def test_signals_work_as_before_afterwards_and_threads_may_train() -> None:
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    tune(toy_net(), ToyImages(), PLAIN, **RUN)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == former
    model, expected = toy_net(), toy_net()
    thread = threading.Thread(target=tune, args=(model, ToyImages(), PLAIN), kwargs=RUN)
    thread.start()
    thread.join()
    tune(expected, ToyImages(), PLAIN, **RUN)
    assert same(weights(model), weights(expected))


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def impatient(event: dict[str, Any]) -> None:
        if event["event"] == "saved":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRunError) as caught:
        tune(toy_net(), ToyImages(), PLAIN, folder=tmp_path, on_event=impatient, **RUN)
    assert "saved" not in caught.value.message
    assert states(tmp_path) == ["state-00001-00000000.safetensors"]


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    model = toy_net()
    report = tune(model, ToyImages(), SGD, folder=tmp_path, **RUN)
    images, again = ToyImages(), toy_net()
    assert tune(again, images, SGD, folder=tmp_path, **RUN) == report
    assert images.val_loads == 0
    assert same(weights(again), weights(model))


@pytest.mark.parametrize("change", [{"lr": 0.04}, {"seed": 8}, {"epochs": 4}])
def test_another_job_starts_afresh(tmp_path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    tune(toy_net(), ToyImages(), PLAIN, folder=tmp_path, **RUN)
    fresh, model = toy_net(), toy_net()
    tune(fresh, ToyImages(), PLAIN, **(RUN | change))
    tune(model, ToyImages(), PLAIN, folder=tmp_path, **(RUN | change))
    assert same(weights(model), weights(fresh))
    assert "another job" in caplog.text
    assert len(states(tmp_path)) == 1


def test_other_starting_weights_are_another_job(tmp_path: Path) -> None:
    tune(toy_net(), ToyImages(), PLAIN, folder=tmp_path, **RUN)
    other, expected = toy_net(), toy_net()
    for model in (other, expected):
        model[5].weight.data.mul_(0.5)
    tune(expected, ToyImages(), PLAIN, **RUN)
    tune(other, ToyImages(), PLAIN, folder=tmp_path, **RUN)
    assert same(weights(other), weights(expected))


def test_a_truncated_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tune(toy_net(), ToyImages(), PLAIN, folder=tmp_path, **RUN)
    whole = tmp_path / states(tmp_path)[0]
    (tmp_path / "state-00009-00000000.safetensors").write_bytes(whole.read_bytes()[:200])
    images = ToyImages()
    tune(toy_net(), images, PLAIN, folder=tmp_path, **RUN)
    assert images.val_loads == 0
    assert "passed over" in caplog.text


def test_a_checkpoint_holds_no_pickle_and_every_state(tmp_path: Path) -> None:
    tune(toy_net(), ToyImages(), SGD, folder=tmp_path, **RUN)
    path = tmp_path / states(tmp_path)[0]
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    progress = json.loads(header.pop("__metadata__")["prunecli_finetune"])
    assert progress["epoch"] == 3
    assert len(progress["history"]) == 3
    assert {name.split(".")[0] for name in header} == {"model", "optimizer", "best", "ema"}
    assert "optimizer.0.weight.momentum_buffer" in header


# --------------------------------------------------------------------------------------------------- failures


def test_full_disk_keeps_the_former_checkpoint(tmp_path: Path) -> None:
    train_until_saved = ToyImages()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event: dict[str, Any]) -> None:
        if event["event"] == "saved":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    try:
        with pytest.raises(PruneError, match=r"Cannot write .*state-00002"):
            tune(toy_net(), train_until_saved, PLAIN, folder=tmp_path, on_event=fill, **RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert states(tmp_path) == ["state-00001-00000000.safetensors"]
    whole, model = toy_net(), toy_net()
    tune(whole, ToyImages(), PLAIN, **RUN)
    tune(model, ToyImages(), PLAIN, folder=tmp_path, **RUN)
    assert same(weights(model), weights(whole))


def test_nan_loss_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    images = ToyImages()
    inputs, labels = images.train.tensors
    poisoned = torch.randperm(96, generator=torch.Generator().manual_seed(1))[40]  # epoch 2, step 6

    def poison(event: dict[str, Any]) -> None:
        if event["event"] == "epoch":
            inputs[poisoned] = torch.nan

    with pytest.raises(PruneError, match=r"loss is nan at step 6 of epoch 2 \(learning rate 0.05\)") as caught:
        tune(toy_net(), images, PLAIN, folder=tmp_path, on_event=poison, **RUN)
    assert str(tmp_path) in caught.value.message
    assert states(tmp_path) == ["state-00001-00000000.safetensors"]
    assert not torch.equal(labels, inputs)


def test_a_state_with_infinite_weights_is_never_saved(tmp_path: Path) -> None:
    settings = PLAIN.updated(checkpoint_every=1)
    with pytest.raises(PruneError, match=r"not finite|loss is (nan|inf)"):
        tune(toy_net(), ToyImages(), settings, folder=tmp_path, **(RUN | {"lr": 1e30}))
    for path in tmp_path.glob("state-*"):
        progress = checkpoint.newest(tmp_path, digest=json.loads(_header(path)["prunecli_finetune"])["job"])
        assert progress is not None
        assert all(tensor.isfinite().all() for tensor in progress[1].values())


def _header(path: Path) -> dict[str, str]:
    raw = path.read_bytes()
    metadata: dict[str, str] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    return metadata


def test_frozen_models_are_refused() -> None:
    model = toy_net()
    model.requires_grad_(requires_grad=False)
    with pytest.raises(PruneError, match="frozen"):
        tune(model, ToyImages(), PLAIN, **RUN)


def test_training_that_changes_nothing_is_an_error() -> None:
    with pytest.raises(PruneError, match="changed no parameter"):
        tune(toy_net(), ToyImages(), PLAIN, **(RUN | {"lr": 1e-60}))


def test_no_epochs_or_no_batches() -> None:
    with pytest.raises(UsageError, match="at least one epoch"):
        tune(toy_net(), ToyImages(), PLAIN, **(RUN | {"epochs": 0}))
    with pytest.raises(PruneError, match="not one batch"):
        tune(toy_net(), ToyImages(train=4), PLAIN, **RUN)


# --------------------------------------------------------------------------------------- the shipped checkpoint


def test_the_digits_checkpoint_is_what_its_metadata_says() -> None:
    path = paper_nets.ASSETS / "cifar_resnet20_digits.safetensors"
    metadata = _header(path)
    assert path.stat().st_size < 2_000_000
    assert metadata["made_by"].startswith("benchmarks/train_digits.py")
    loaded = load_model("cifar_resnet20.digits")
    images = open_data(DataSettings(name="digits"), input_spec(loaded.ref), num_classes=10, seed=0)
    found = evaluate(loaded.model, images.val_loader(), device=CPU)
    assert f"{found.top1:.2f}" == metadata["top1_held_out"]
    assert found.top1 > 99


# ------------------------------------------------------------------------------------- BatchNorm re-estimation


def test_bn_statistics_by_hand() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3, momentum=0.3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    model[1].running_mean.fill_(9.0)
    batches = [torch.randn(5, 3, 4, 4) for _ in range(3)]
    assert recalibrate_bn_(model, [batches[0], (batches[1], torch.zeros(5)), batches[2]], device=CPU) == 2
    torch.testing.assert_close(model[1].running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0))
    assert model[1].momentum == 0.3
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bn_without_batches_keeps_the_statistics() -> None:
    model = toy_net()
    before = weights(model)
    with pytest.raises(PruneError, match="training image"):
        recalibrate_bn_(model, [], device=CPU)
    assert same(weights(model), before)
    assert recalibrate_bn_(nn.Linear(2, 2), [], device=CPU) == 0


# ------------------------------------------------------------------------------------------------------ probe


def probe(model: nn.Module, images: ToyImages, steps: int, lr: float = 0.05) -> ProbeResult:
    return probe_loss(model, images, steps=steps, lr=lr, settings=SGD, device=CPU, seed=5)


def test_probe_leaves_the_model_and_the_validation_split_alone() -> None:
    images, model = ToyImages(), toy_net()
    before = weights(model)
    result = probe(model, images, steps=20)
    assert same(weights(model), before)
    assert images.val_loads == 0
    assert result == probe(model, images, steps=20)
    assert result.train_loss is not None
    assert result.val_loss < probe(model, images, steps=0).val_loss


def test_probe_of_no_steps_only_evaluates() -> None:
    images, model = ToyImages(), toy_net()
    result = probe(model, images, steps=0)
    expected = evaluate(model, [images.calibration(96)], device=CPU)
    assert result.train_loss is None
    assert result.val_loss == pytest.approx(expected.loss)
    assert result.val_top1 == expected.top1


def test_probe_is_judged_on_images_it_did_not_train_on() -> None:
    images = ToyImages()
    inputs, labels = images.train.tensors
    held = inputs[:24]
    labels[:24] = (labels[:24] + 1) % 6  # a lie in the held-out part: only fitting it could give a small loss
    result = probe(toy_net(), images, steps=200)
    assert torch.equal(held, images.calibration(96)[0][:24])
    assert result.val_loss > 1.5
    assert result.train_loss is not None
    assert result.train_loss < result.val_loss


def test_running_statistics_do_not_decide_a_probe() -> None:
    model, shifted = toy_net(), toy_net()
    shifted[1].running_mean.fill_(5.0)
    assert probe(model, ToyImages(), steps=5) == probe(shifted, ToyImages(), steps=5)
    assert probe(model, ToyImages(), steps=0) != probe(shifted, ToyImages(), steps=0)


def test_a_diverging_probe_is_infinitely_bad() -> None:
    result = probe(toy_net(), ToyImages(), steps=5, lr=1e30)
    assert result.val_loss == float("inf")


@pytest.mark.parametrize("regulariser", ["kernorth", "orthconv"])
def test_a_regulariser_is_minimised_beside_the_loss_and_stays_out_of_the_figures(regulariser: Any) -> None:
    settings = PLAIN.updated(regulariser={"kind": regulariser, "weight": 1.0})
    plain, model = toy_net(), toy_net()
    alone = tune(plain, ToyImages(), PLAIN, **RUN)
    report = tune(model, ToyImages(), settings, **RUN)
    assert orthogonality(model, regulariser) < 0.7 * orthogonality(plain, regulariser)
    assert report.history[0]["train_loss"] == pytest.approx(alone.history[0]["train_loss"], rel=0.5)


def orthogonality(model: nn.Module, regulariser: Any) -> float:
    with torch.no_grad():
        return float(Orthogonality(model, regulariser, 1.0).value())
