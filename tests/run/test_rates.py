"""Measured learning rates: one cut, a few short trainings, each done once, whatever breaks in between."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prunecli.errors import UsageError
from prunecli.files import write_json
from prunecli.measure.accuracy import evaluate
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.settings import DistillSettings
from prunecli.run import rates
from prunecli.run.folder import RunFolder
from prunecli.run.source import load_source, open_images
from prunecli.surgery.cut import cut
from prunecli.training import finetune
from prunecli.training.loop import TrainingRun
from prunecli.values.measured_rates import MeasuredRates
from toys.jobs import call, sentence, without_extras

CPU = torch.device("cpu")
DATA = ("data.train_limit=64", "data.val_limit=48", "data.batch_size=32", "spectrum.samples=0")
NET = ("lenet5_relu", "--no-pretrained", "--data=digits", "--target=ratio=0.5", "--device=cpu", "prune.round_to=1")
JOB = ("lr", "--measure", *NET, *DATA, "--recover=lstsq", "finetune.momentum=0.5")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a measurement that nothing disturbed."""
    folder = tmp_path_factory.mktemp("rates") / "whole"
    done = call(*JOB, f"--out={folder}", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document.pop("folder"), document.pop("page")) == (str(folder), str(folder / "lr.html"))
    assert document == json.loads((folder / "lr.json").read_text())
    return folder


def result(folder: Path) -> MeasuredRates:
    return MeasuredRates.model_validate_json((folder / "lr.json").read_text())


def timeless(folder: Path) -> Any:
    """The figures without wall times."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(entry) for key, entry in value.items() if key != "seconds"}
        return [kept(entry) for entry in value] if isinstance(value, list) else value

    return kept(json.loads((folder / "lr.json").read_text()))


@pytest.fixture
def two_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less to wait for where the rates do not matter."""
    monkeypatch.setattr(rates, "rates_around", lambda recommended: (recommended / 3, recommended))


# ---------------------------------------------------------------------------------------------- the measurement


def test_every_arm_meets_every_rate_once(whole: Path) -> None:
    found = result(whole)
    assert [arm.name for arm in found.arms] == ["none", "orthp", "lstsq"]
    assert [(trial.arm, trial.lr) for trial in found.trials] == [
        (arm, lr) for arm in ("none", "orthp", "lstsq") for lr in found.rates
    ]
    assert found.rates[2] == found.lr.recommended
    assert (found.chosen, found.epochs, found.steps, found.images) == ("lstsq", 1, 2, 48)
    assert found.regret.arm == "lstsq"
    names = {path.name for path in whole.iterdir()}
    assert names == {"checkpoints", "log.jsonl", "lr.html", "lr.json", "plan.json", "recipe.yaml"}
    assert [path.name for path in (whole / "checkpoints").rglob("*") if path.is_file()] == ["progress.json"]


def test_the_plain_arm_is_the_unrepaired_cut_trained_at_that_rate(whole: Path) -> None:
    folder, found = RunFolder(path=whole), result(whole)
    recipe = folder.recipe()
    source = load_source(recipe)
    images = open_images(recipe, source)
    assert images is not None
    for arm, trial in (("none", found.trials_of("none")[1]), ("none", found.trials_of("none")[4])):
        model = cut(source.model, folder.plan())
        start = next(one.start for one in found.arms if one.name == arm)
        before = evaluate(model, images.val_loader(), device=CPU)
        assert (start.top1, start.loss) == (before.top1, before.loss)
        schedule = recipe.finetune.schedule.updated(min_lr=found.lr.final_lr)
        settings = recipe.finetune.updated(schedule=schedule, distill=DistillSettings(alpha=0.0))
        finetune.finetune(model, images, settings, lr=trial.lr, epochs=1, run=TrainingRun(device=CPU, seed=recipe.seed))
        after = evaluate(model, images.val_loader(), device=CPU)
        assert trial.top1 == after.top1
        assert trial.loss == pytest.approx(after.loss, rel=1e-12)
    losses = {arm.name: arm.start.loss for arm in found.arms}
    assert len(set(losses.values())) == 3, "the others were repaired"


# ---------------------------------------------------------------------------------------------- broken off


def interrupting(patch: pytest.MonkeyPatch, after: int | None) -> list[tuple[str, float]]:
    """Records the trainings; Ctrl-C comes before the one that follows the first ``after``."""
    begun: list[tuple[str, float]] = []
    trial = rates._trial

    def recorded(job: Any, start: Any, arm: str, lr: float) -> Any:
        if len(begun) == after:
            signal.raise_signal(signal.SIGINT)
        begun.append((arm, lr))
        return trial(job, start, arm, lr)

    patch.setattr(rates, "_trial", recorded)
    return begun


@pytest.fixture(scope="module")
def broken(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same measurement, interrupted behind the seventh training, in the middle of the second arm."""
    folder = tmp_path_factory.mktemp("rates") / "a folder"
    with pytest.MonkeyPatch.context() as patch:
        begun = interrupting(patch, 7)
        stopped = call(*JOB, f"--out={folder}")
    assert stopped.exit_code == 130, stopped.stderr
    assert len(begun) == 7
    hint = f"`prunecli lr --measure --resume --out '{folder}'` continues."
    assert sentence(stopped).endswith(f"Error: Interrupted; {folder} keeps what was finished. {hint}")
    assert not (folder / "lr.json").exists()
    return folder


def test_resumed_it_trains_what_is_left_and_ends_the_same(whole: Path, broken: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(broken, tmp_path / "run"))
    with pytest.MonkeyPatch.context() as patch:
        begun = interrupting(patch, None)
        resumed = call("lr", "--measure", "--resume", f"--out={folder}")
    assert resumed.exit_code == 0, resumed.stderr
    assert begun == [(trial.arm, trial.lr) for trial in result(whole).trials[7:]]
    assert timeless(folder) == timeless(whole)
    assert (folder / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("lr", "--measure", "--resume", "--seed=1", *NET), "was started with another recipe"),
        (("compress", "--resume"), "was started with `prunecli lr --measure`"),
        ((*JOB,), "holds an unfinished run"),
    ],
)
def test_another_job_is_not_mixed_into_it(broken: Path, arguments: tuple[str, ...], said: str) -> None:
    before = (broken / "checkpoints" / "progress.json").read_bytes()
    refused = call(*arguments, f"--out={broken}")
    assert refused.exit_code == 2
    assert said in sentence(refused)
    assert (broken / "checkpoints" / "progress.json").read_bytes() == before


@pytest.mark.usefixtures("two_rates")
def test_a_finished_measurement_is_replaced_only_by_force(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    before = (folder / "lr.json").read_bytes()
    for arguments, said in ((JOB, "holds a finished run"), (("lr", "--measure", "--resume"), "nothing to resume")):
        refused = call(*arguments, f"--out={folder}")
        assert (refused.exit_code, (folder / "lr.json").read_bytes()) == (2, before)
        assert said in sentence(refused)
    replaced = call(*JOB, "--recover=none", "--force", f"--out={folder}")
    assert replaced.exit_code == 0, replaced.stderr
    found = result(folder)
    assert ([arm.name for arm in found.arms], found.chosen, len(found.trials)) == (["none", "orthp"], "none", 4)
    assert "plain pruning, which is an arm already" in " ".join(replaced.stdout.split())


# ---------------------------------------------------------------------------------------------- the cut of a run


@pytest.mark.usefixtures("two_rates")
def test_the_cut_and_the_recovery_of_a_run_are_its_own(toy_run: Path, tmp_path: Path) -> None:
    run = RunFolder(path=toy_run)
    done = call("lr", str(toy_run), "--measure", *DATA, "seed=0", f"--out={tmp_path / 'out'}")
    assert done.exit_code == 0, done.stderr
    found, report = result(tmp_path / "out"), run.report()
    assert RunFolder(path=tmp_path / "out").plan() == run.plan()
    assert found.arms[0].start.params == report.stages[1].params
    kept = "+".join(row.name for row in report.recovery if row.kept)
    assert found.chosen == (kept or "none")
    assert (found.epochs, RunFolder(path=tmp_path / "out").recipe().finetune.epochs) == (1, 1)
    assert f"The cut is that of {toy_run}." in found.warnings
    assert found.images == 48, "what is given beside the run goes before its recipe"


def no_cut(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    for group in plan["groups"]:
        group["keep"] = list(range(group["width"]))
    write_json(folder / "plan.json", plan)


def trained_before(folder: Path) -> None:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "method": {"kind": "tpp"}}))


def unread_channels(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    group = next(group for group in plan["groups"] if len(group["keep"]) < group["width"])
    group["members"] = [member for member in group["members"] if member["role"] != "in"]
    write_json(folder / "plan.json", plan)


@pytest.mark.parametrize(
    ("edit", "options", "code", "said"),
    [
        (None, ["seed=1"], 1, "is not the model that"),
        (no_cut, [], 1, "has cut nothing, so there is no cut to repeat"),
        (trained_before, [], 2, "trained before its cut, which only the whole job repeats"),
        (unread_channels, [], 6, "cannot be pruned correctly"),
        (lambda folder: (folder / "report.json").unlink(), [], 2, "holds an unfinished run"),
    ],
)
def test_a_run_whose_cut_cannot_be_repeated_is_refused(
    toy_run: Path, tmp_path: Path, edit: Any, options: list[str], code: int, said: str
) -> None:
    run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    if edit:
        edit(run)
    refused = call("lr", str(run), "--measure", *DATA, *options, f"--out={tmp_path / 'out'}")
    assert refused.exit_code == code, sentence(refused)
    assert said in sentence(refused)
    assert "Unexpected" not in refused.stderr
    assert not (tmp_path / "out").exists()


def test_the_run_itself_is_never_replaced(toy_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    refused = call("lr", str(run), "--measure", "--force", f"--out={run}")
    assert refused.exit_code == 2
    assert "is the run to measure and cannot be replaced" in sentence(refused)
    assert (run / "report.json").is_file()


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_a_training_that_diverges_counts_as_guessing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_extras(monkeypatch)
    monkeypatch.setattr(rates, "rates_around", lambda recommended: (recommended, 1e12))
    recipe = Recipe.from_mapping(
        {
            "model": "lenet5_relu",
            "pretrained": False,
            "data": {"name": "digits", "train_limit": 64, "val_limit": 48, "batch_size": 32},
            "target": "ratio=0.5",
            "prune": {"round_to": 1, "criterion": "l1"},
            "recover": {"steps": []},
            "spectrum": {"samples": 0},
            "device": "cpu",
        }
    )
    found = rates.measure_rates(recipe, out=tmp_path / "run")
    lost = [trial for trial in found.trials if trial.diverged]
    assert [(trial.arm, trial.lr, trial.top1, trial.loss) for trial in lost] == [
        ("none", 1e12, 10.0, None),
        ("orthp", 1e12, 10.0, None),
    ]
    assert "Diverged, and counted as guessing: none at 1e+12, orthp at 1e+12." in found.verdicts
    assert not list((tmp_path / "run" / "checkpoints").rglob("state-*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--measure", "--target=ratio=0.5"], "Measuring learning rates needs data. Give --data."),
        (["--measure", "--data=digits"], "No target was given."),
        (["--measure", "--data=digits", "--target=ratio=0.5", "--epochs=0"], "0 epochs tells nothing"),
        (
            [
                "--measure",
                "--data=digits",
                "--target=ratio=0.5",
                "finetune.schedule=rewind",
                "finetune.original={lr: 0.1, epochs: 20}",
            ],
            "Schedule rewind says its own rates",
        ),
        (["--measure", "--data=digits", "--target=ratio=0.5", "init=sao", "--recover=none"], "init sao starts anew"),
        (["--target=ratio=0.5"], "--target belongs to a measurement. Add --measure."),
        (["--out=there"], "--out belongs to a measurement. Add --measure."),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = call("lr", "lenet5_relu", "--no-pretrained", *options)
    assert refused.exit_code == 2, sentence(refused)
    assert said in sentence(refused)
    assert not refused.stdout
    assert not list(tmp_path.iterdir())


def test_the_resolved_recipe_can_be_seen_first(toy_run: Path) -> None:
    shown = call("lr", str(toy_run), "--measure", "--print-config", "--epochs=3", "--recover=bn", "data.batch_size=16")
    recipe = Recipe.from_mapping(yaml.safe_load(shown.stdout))
    run = RunFolder(path=toy_run).recipe()
    assert (recipe.model, recipe.target, recipe.prune) == (run.model, run.target, run.prune), "the run's own"
    assert (recipe.finetune.epochs, recipe.recover.steps, recipe.data.batch_size) == (3, ("bn",), 16), "what was given"
    assert rates.resolved(recipe).recipe == recipe
    with pytest.raises(UsageError, match="needs data"):
        rates.resolved(recipe.updated(data=recipe.data.updated(name=None)))
