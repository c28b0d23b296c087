"""Whole jobs broken off at any change of the run folder: nothing is lost, and the end is the same to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunecli.errors import TargetError, UsageError
from prunecli.files import write_json
from prunecli.graph.build import build_graph
from prunecli.models.load import load_model
from prunecli.proof import equivalence
from prunecli.recipe.recipe import Recipe
from prunecli.run import folder as run_folder
from prunecli.run import pipeline, plan_and_prove, verify
from prunecli.run.folder import RunFolder
from prunecli.run.job import open_job
from prunecli.run.learning_rate import learning_rate_at
from prunecli.run.source import load_source, open_images
from prunecli.training import finetune
from prunecli.values.report import Report
from toys.jobs import JOB, call, sentence, without_extras

ROOT = Path(__file__).parents[2]
SAVING = "finetune.checkpoint_every=3"

# One place in each stage, and each side of every rename that counts: (the change before which the signal is sent).
PLACES = [
    "os.mkdir .",  # the very first
    "os.rename .recipe.yaml.PID.tmp",
    "os.rename .plan.json.PID.tmp",
    "os.rename checkpoints/.progress.json.PID.tmp",  # the plan's
    "os.rename checkpoints/.progress.json.PID.tmp 2",  # dense measured
    "os.rename checkpoints/.progress.json.PID.tmp 3",  # pruned
    "os.rename checkpoints/.progress.json.PID.tmp 4",  # recovered
    "os.rename checkpoints/finetune/.state-00000-00000006.safetensors.PID.tmp",  # in the middle of the first epoch
    "os.remove checkpoints/finetune/state-00001-00000003.safetensors",  # in the middle of the second
    "os.rename checkpoints/.finetuned.safetensors.PID.tmp",
    "os.rename checkpoints/.progress.json.PID.tmp 5",  # between fine-tuning and export
    "os.rename .model.safetensors.PID.tmp",
    "os.rename .config.json.PID.tmp",
    "os.rename .reference.safetensors.PID.tmp",  # before verification
    "os.rename .report.html.PID.tmp",  # behind it
    "os.rename .report.json.PID.tmp",
]
FEW = [PLACES[at] for at in (7, 13)]


class Jobs:
    """The process of ``faulty.py``, and one job that nothing disturbed."""

    job: Sequence[str] = (*JOB, SAVING)

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.whole = folder / "whole"
        done = self.run("compress", *self.job, folder=self.whole)
        assert done["status"] == 0, done["stderr"]
        seen: dict[str, int] = {}
        self.steps: dict[str, int] = {}
        for number, step in enumerate(done["steps"], start=1):
            seen[step] = seen.get(step, 0) + 1
            self.steps[step if seen[step] == 1 else f"{step} {seen[step]}"] = number

    def run(self, *arguments: str, folder: Path, **order: Any) -> dict[str, Any]:
        order |= {"arguments": [*arguments, f"--out={folder}"], "folder": str(folder)}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def breaks_off_at(self, place: str, folder: Path, number: int) -> dict[str, Any]:
        return self.run("compress", *self.job, folder=folder, stop_at=self.steps[place], signal=number)

    def is_whole(self, folder: Path) -> bool:
        files = ("model.safetensors", "plan.json", "recipe.yaml", "reference.safetensors")
        return all((folder / name).read_bytes() == (self.whole / name).read_bytes() for name in files)


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "toys.faulty"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.terminate()


@pytest.fixture(scope="module")
def jobs(process: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(process, tmp_path_factory.mktemp("jobs"))


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def killed_and_resumed(jobs: Jobs, folder: Path, place: str) -> None:
    assert jobs.breaks_off_at(place, folder, signal.SIGKILL)["status"] == -signal.SIGKILL
    again = ["--resume"] if (folder / "recipe.yaml").exists() else list(jobs.job)
    resumed = jobs.run("compress", *again, folder=folder)
    assert resumed["status"] == 0, resumed["stderr"]
    assert jobs.is_whole(folder)
    assert names(folder) == names(jobs.whole)
    assert verify.verify_here(folder).ok


@pytest.mark.parametrize("place", FEW)
def test_killed_and_resumed_ends_the_same(jobs: Jobs, tmp_path: Path, place: str) -> None:
    killed_and_resumed(jobs, tmp_path / "run", place)


@pytest.mark.slow
@pytest.mark.parametrize("place", [place for place in PLACES if place not in FEW])
def test_killed_anywhere_and_resumed_ends_the_same(jobs: Jobs, tmp_path: Path, place: str) -> None:
    killed_and_resumed(jobs, tmp_path / "run", place)


@pytest.mark.parametrize(
    ("place", "number"), [(PLACES[4], signal.SIGINT), (PLACES[8], signal.SIGTERM), (PLACES[13], signal.SIGINT)]
)
def test_interrupted_says_how_to_go_on(jobs: Jobs, tmp_path: Path, place: str, number: int) -> None:
    folder = tmp_path / "a run"
    broken = jobs.breaks_off_at(place, folder, number)
    assert broken["status"] == 130, broken["stderr"]
    assert broken["stderr"].splitlines()[-1] == (
        f"Error: Interrupted; {folder} keeps what was finished. "
        f"`prunecli compress --resume --out '{folder}'` continues."
    )
    resumed = jobs.run("compress", "--resume", folder=folder)
    assert resumed["status"] == 0, resumed["stderr"]
    assert jobs.is_whole(folder)


def test_killed_while_an_old_run_is_replaced_leaves_no_broken_finished_run(jobs: Jobs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(jobs.whole, folder)
    forced = ("compress", *JOB, SAVING, "--force")
    assert jobs.run(*forced, folder=folder, stop_at=5, signal=signal.SIGKILL)["status"] == -signal.SIGKILL
    assert not (folder / "report.json").exists()
    assert not (folder / "model.safetensors").exists()
    assert jobs.run(*forced, folder=folder)["status"] == 0
    assert jobs.is_whole(folder)


# ---------------------------------------------------------------------------------------------- phases before the cut

# GReg-2, with a phase before the plan and one after it, each two epochs of eight steps.
PHASES = [
    *JOB,
    SAVING,
    "--epochs=1",
    "--method=greg",
    "method.variant=2",
    "method.pick_step=0.002",
    "method.reg_every=3",
]
PHASES += ["method.reg_step=0.33", "method.stabilise=7", "method.lr=0.01"]


class PhaseJobs(Jobs):
    job = PHASES


@pytest.fixture(scope="module")
def phase_jobs(process: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return PhaseJobs(process, tmp_path_factory.mktemp("phase-jobs"))


@pytest.mark.parametrize(
    "place",
    [
        "os.rename checkpoints/push/.state-00001-00000003.safetensors.PID.tmp",
        pytest.param("os.rename .plan.json.PID.tmp", marks=pytest.mark.slow),  # between the two phases
    ],
)
def test_killed_around_a_phase_and_resumed_ends_the_same(phase_jobs: Jobs, tmp_path: Path, place: str) -> None:
    killed_and_resumed(phase_jobs, tmp_path / "run", place)


def test_greg2_plans_from_what_the_growing_penalty_left(phase_jobs: Jobs) -> None:
    folder = RunFolder(path=phase_jobs.whole)
    report, plan = folder.report(), folder.plan()
    assert [stage.name for stage in report.stages] == ["dense", "regularised", "pruned", "recovered", "finetuned"]
    grow, push = report.phases
    assert (grow.name, grow.steps, grow.history[-1]["reg"]) == ("grow", 15, 0.008)
    assert (push.name, push.steps, push.norm_after < push.norm_before) == ("push", 16, True)
    assert report.total_epochs == 15 / 8 + 16 / 8 + 1
    dense = load_source(folder.recipe()).model.get_parameter("conv1.weight").abs().sum((1, 2, 3))
    (found,) = (group.score for group in plan.groups if group.name == "conv1")
    assert found != pytest.approx(dense.tolist(), rel=1e-3)
    assert not list(folder.checkpoints.glob("*.safetensors"))


TPP = ["--method=tpp", "method.reg_step=0.25", "method.reg_every=2", "method.stabilise=8", "method.zero_every=2"]


def test_tpp_cuts_what_it_has_set_to_zero(jobs: Jobs, tmp_path: Path) -> None:
    done = jobs.run("compress", *JOB, "--epochs=1", *TPP, folder=tmp_path / "run")
    assert done["status"] == 0, done["stderr"]
    report = RunFolder(path=tmp_path / "run").report()
    (phase,) = report.phases
    assert (phase.method, phase.steps, phase.norm_after, phase.penalty_after) == ("tpp", 16, 0, 0)
    stages = {stage.name: stage for stage in report.stages}
    assert stages["regularised"].loss == pytest.approx(stages["pruned"].loss, rel=1e-5)
    assert stages["regularised"].params == stages["dense"].params > stages["pruned"].params
    assert report.total_epochs == 16 / 8 + 1


# ---------------------------------------------------------------------------------------------- learned gates

ABP = [part for part in PHASES[: len(JOB) + 2] if not part.startswith("--target")]
ABP += ["--method=abp", "method.steps=12", "method.lr=0.05", "prune.round_to=1", "--recover=none"]


class GateJobs(Jobs):
    job = ABP


@pytest.fixture(scope="module")
def gate_jobs(process: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return GateJobs(process, tmp_path_factory.mktemp("gate-jobs"))


@pytest.mark.parametrize(
    "place",
    [
        # the gates are written, the weights under them not yet
        pytest.param("os.rename checkpoints/.gate.safetensors.PID.tmp", marks=pytest.mark.slow),
        pytest.param("os.rename checkpoints/gate/.state-00001-00000003.safetensors.PID.tmp", marks=pytest.mark.slow),
        pytest.param("os.rename .plan.json.PID.tmp", marks=pytest.mark.slow),
    ],
)
def test_killed_around_learning_gates_and_resumed_ends_the_same(gate_jobs: Jobs, tmp_path: Path, place: str) -> None:
    killed_and_resumed(gate_jobs, tmp_path / "run", place)


def test_without_a_target_closed_channels_leave_and_the_cut_net_is_the_gated_one(gate_jobs: Jobs) -> None:
    folder = RunFolder(path=gate_jobs.whole)
    report, plan = folder.report(), folder.plan()
    (phase,) = report.phases
    assert (phase.name, phase.steps, report.total_epochs) == ("gate", 12, 12 / 8 + 1)
    assert (plan.criterion, plan.ranking) == ("gates", "learned")
    for group in plan.groups:
        assert group.score is not None
        opened = tuple(at for at, magnitude in enumerate(group.score) if magnitude >= 0.5)
        assert group.keep == opened or len(opened) == 0 < len(group.keep)
    left = sum(len(group.keep) for group in plan.groups) / sum(group.width for group in plan.groups)
    assert report.target is not None
    assert (report.target.metric, report.target.reached) == ("ratio", pytest.approx(1 - left))
    assert phase.open_after == pytest.approx(1 - report.target.asked)
    stages = {stage.name: stage for stage in report.stages}
    assert stages["regularised"].loss == pytest.approx(stages["pruned"].loss, rel=1e-5)
    assert stages["regularised"].params == stages["dense"].params > stages["pruned"].params
    assert any("of the channels; " in warning for warning in report.warnings)


def test_with_a_target_gates_rank_the_channels() -> None:
    recipe = Recipe.from_mapping(
        {
            "model": "lenet5_relu",
            "pretrained": False,
            "method": "abp",
            "target": "ratio=0.25",
            "data": {"name": "digits"},
        }
    )
    source = load_source(recipe)
    groups = build_graph(source.model, source.spec.size).groups
    generator = torch.Generator().manual_seed(0)
    gates = {group.name: torch.rand(group.width, generator=generator) for group in groups}
    planned, _ = plan_and_prove.plan_and_prove(source, recipe, open_images(recipe, source), gates)
    closed = sum(int((values < 0.5).sum()) for values in gates.values()) / sum(map(len, gates.values()))
    assert f"left to themselves, the gates would close {closed:.4g} of the channels" in planned.notes
    assert (planned.target.asked, planned.plan.criterion) == (0.25, "gates")
    for group in planned.plan.cut_groups:
        gone = sorted(set(range(group.width)) - set(group.keep))
        assert gates[group.name][gone].max() <= gates[group.name][list(group.keep)].min()


def test_a_target_out_of_reach_is_refused_before_any_gate_is_learnt() -> None:
    recipe = Recipe.from_mapping(
        {
            "model": "lenet5_relu",
            "pretrained": False,
            "method": "abp",
            "target": "macs=0.01%",
            "data": {"name": "digits"},
        }
    )
    source = load_source(recipe)
    with pytest.raises(TargetError, match="can be reached"):
        plan_and_prove.plan_and_prove(source, recipe, open_images(recipe, source))


# ---------------------------------------------------------------------------------------------- the same twice


def test_equal_recipes_give_equal_bytes(jobs: Jobs, tmp_path: Path) -> None:
    done = jobs.run("compress", f"--recipe={jobs.whole / 'recipe.yaml'}", "--quiet", folder=tmp_path / "again")
    assert done["status"] == 0
    assert done["stderr"] == ""
    assert jobs.is_whole(tmp_path / "again")


# ---------------------------------------------------------------------------------------------- resume refuses


@pytest.fixture(scope="module")
def unfinished(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed behind recovery."""
    folder = tmp_path_factory.mktemp("unfinished") / "run"
    jobs.breaks_off_at("os.rename .model.safetensors.PID.tmp", folder, signal.SIGKILL)
    return folder


def edited(source: Path, folder: Path, name: str, edit: str) -> Path:
    shutil.copytree(source, folder)
    file = folder / name
    match edit:
        case "cut":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        case "gone":
            file.unlink()
        case "other":
            values = json.loads(file.read_text())
            if name == "plan.json":
                group = next(group for group in values["groups"] if len(group["keep"]) < group["width"])
                group["keep"] = sorted(set(range(group["width"])) - set(group["keep"]))
            else:
                values["source_digest"] = "0" * 64
            write_json(file, values)
        case "swapped":
            file.write_bytes((folder / "checkpoints" / "finetune" / "state-00002-00000000.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("name", "edit", "code", "said"),
    [
        ("plan.json", "cut", 1, "plan.json is not readable JSON"),
        ("plan.json", "gone", 1, "plan.json is missing"),
        ("plan.json", "other", 1, "plan.json was changed after the run had started"),
        ("checkpoints/progress.json", "cut", 1, "progress.json is not readable JSON"),
        ("checkpoints/progress.json", "other", 1, "weights of lenet5_relu are not those"),
        ("checkpoints/recovered.safetensors", "cut", 1, "recovered.safetensors is truncated"),
        ("checkpoints/recovered.safetensors", "gone", 1, "recovered.safetensors is missing"),
        ("checkpoints/finetuned.safetensors", "swapped", 1, "does not hold the weights of this run"),
        ("recipe.yaml", "cut", 2, "recipe.yaml"),
        ("recipe.yaml", "gone", 2, "holds no run to resume"),
    ],
)
def test_a_damaged_run_is_not_resumed(
    unfinished: Path, tmp_path: Path, name: str, edit: str, code: int, said: str
) -> None:
    folder = edited(unfinished, tmp_path / "run", name, edit)
    result = call("compress", "--resume", f"--out={folder}")
    assert result.exit_code == code, result.stderr
    assert said in sentence(result)
    assert "Unexpected" not in result.stderr
    assert not (folder / "report.json").exists()


def test_a_run_is_resumed_only_by_its_own_recipe_and_command(unfinished: Path) -> None:
    before = {name: (unfinished / name).read_bytes() for name in ("recipe.yaml", "checkpoints/progress.json")}
    result = call("compress", *JOB, SAVING, "--seed=1", "--resume", f"--out={unfinished}")
    assert result.exit_code == 2
    assert "another recipe" in sentence(result)
    result = call("finetune", "--resume", f"--out={unfinished}")
    assert result.exit_code == 2
    assert "`prunecli compress --resume" in sentence(result)
    assert {name: (unfinished / name).read_bytes() for name in before} == before


def test_another_process_may_not_work_in_the_same_folder(
    jobs: Jobs, unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_LOCK_SECONDS", 0)
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    with run_folder.held(RunFolder(path=folder)):
        result = call("compress", "--resume", f"--out={folder}")
    assert result.exit_code == 2
    assert "Another process is working in" in sentence(result)
    assert jobs.run("compress", "--resume", folder=folder)["status"] == 0


# ---------------------------------------------------------------------------------------------- refused before any work


def test_a_cut_that_cannot_be_proved_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = equivalence.Equivalence(relative_error=0.3, exact=False, norms=())
    monkeypatch.setattr(equivalence, "equivalence_error", lambda *_, **__: wrong)
    result = call("compress", *JOB, f"--out={tmp_path / 'run'}")
    assert result.exit_code == 6, result.stderr
    assert "lenet5_relu cannot be pruned correctly" in sentence(result)
    assert "0.3" in sentence(result)
    assert not (tmp_path / "run").exists()


class Branching(nn.Module):
    """A net whose path depends on the values it sees, which no tracer can follow."""

    def __init__(self, num_classes: int = 10, **_: object) -> None:
        super().__init__()
        self.num_classes = self.num_features = num_classes
        self.first, self.head = nn.Linear(64, 32), nn.Linear(32, num_classes)
        self.pretrained_cfg = {"architecture": "toy_branching", "input_size": (1, 8, 8), "num_classes": 10}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        return self.head(hidden if hidden.sum() > 0 else -hidden)


def toy_branching() -> nn.Module:
    return Branching()


def test_an_architecture_that_is_not_understood_is_refused_with_the_place(tmp_path: Path) -> None:
    result = call("compress", f"{__name__}:toy_branching", "--target=ratio=0.5", f"--out={tmp_path / 'run'}")
    assert result.exit_code == 6, result.stderr
    assert "Branching" in sentence(result)
    assert not (tmp_path / "run").exists()


def test_python_callers_get_the_same_errors(tmp_path: Path) -> None:
    recipe = Recipe.from_mapping({"model": "lenet5_relu", "pretrained": False, "finetune": {"epochs": 0}})
    with pytest.raises(UsageError, match="needs data"):
        pipeline.finetune(recipe, out=tmp_path / "run")


def test_a_model_that_is_fine_tuned_alone_does_not_teach_itself(tmp_path, monkeypatch):
    without_extras(monkeypatch)
    taught = []
    real = finetune.finetune

    def watched(model: nn.Module, *args: Any, teacher: nn.Module, **kwargs: Any) -> Any:
        before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
        report = real(model, *args, teacher=teacher, **kwargs)
        after = teacher.state_dict()
        taught.append(teacher is not model and all(before[name].equal(after[name]) for name in before))
        return report

    monkeypatch.setattr(finetune, "finetune", watched)
    recipe = Recipe.from_mapping(
        {
            "model": "lenet5_relu",
            "pretrained": False,
            "data": {"name": "digits", "train_limit": 64, "val_limit": 32, "batch_size": 32},
            "finetune": {"epochs": 1, "distill": {"alpha": 0.5}},
            "spectrum": {"samples": 0},
            "device": "cpu",
        }
    )
    pipeline.finetune(recipe, out=tmp_path / "run")
    assert taught == [True]


TEACHES = ["cifar_resnet20.digits", "--data=digits", "--target=ratio=0.25", "--epochs=1", "--recover=none"]
TEACHES += ["data.train_limit=128", "data.val_limit=64", "spectrum.samples=0", "--device=cpu"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ([], 0.9),
        (["finetune.distill.alpha=0"], 0.0),
        (["finetune.distill.alpha=0.25"], 0.25),
        (["finetune.loss=pskd"], 0.0),
        (["--no-pretrained"], 0.0),  # it knows nothing that could be taught
    ],
)
def test_a_dense_model_that_knows_its_data_teaches_the_cut_one(
    tmp_path: Path, change: list[str], expected: float
) -> None:
    done = call("compress", *TEACHES, *change, f"--out={tmp_path / 'run'}")
    assert done.exit_code == 0, done.stderr
    report = RunFolder(path=tmp_path / "run").report()
    assert report.finetune is not None
    assert report.finetune.distill == expected
    assert ("of the loss distilled from the dense model" in " ".join(done.stdout.split())) == (expected > 0)


@pytest.fixture(scope="module")
def taught_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that recovered a cut model and fine-tuned it with AdamW."""
    folder = tmp_path_factory.mktemp("runs") / "taught"
    done = call("compress", *TEACHES, "--criterion=l1", "finetune.optimizer=adamw", "--recover=bn", f"--out={folder}")
    assert done.exit_code == 0, done.stderr
    return folder


def test_adamw_gets_a_rate_for_the_accuracy_that_is_lost_behind_the_recovery(taught_run: Path) -> None:
    report = RunFolder(path=taught_run).report()
    assert report.lr is not None
    top1 = {stage.name: stage.top1 or 0.0 for stage in report.stages}
    lost = (top1["dense"] - top1["recovered"]) / (top1["dense"] - 10)
    assert 0.03 < lost < 0.9
    assert top1["pruned"] < top1["recovered"]
    assert report.lr.inputs.lost_top1 == pytest.approx(lost)
    alone = 1e-3 * lost / (1 - report.lr.inputs.removed_channels) ** 0.5
    assert report.lr.recommended == pytest.approx(alone * 3.7**0.5, rel=0.05)


@pytest.fixture(scope="module")
def cut_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that pruned a model which knows its data, and did not fine-tune it."""
    folder = tmp_path_factory.mktemp("runs") / "cut"
    job = [part.replace("--epochs=1", "--epochs=0") for part in TEACHES]
    base = "finetune.original={lr: 0.4, epochs: 200}"
    done = call("compress", *job, "--criterion=l1", "--recover=bn", base, f"--out={folder}")
    assert done.exit_code == 0, done.stderr
    return folder


ON_DIGITS = ["--data=digits", "data.train_limit=128", "data.val_limit=64", "--epochs=1", "finetune.optimizer=adamw"]


def asked_rate(run: Path, *options: str) -> dict[str, Any]:
    done = call("lr", str(run), *options, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def tuned(run: Path, out: Path) -> Report:
    done = call("finetune", str(run), *ON_DIGITS, "spectrum.samples=0", f"--out={out}")
    assert done.exit_code == 0, done.stderr
    return RunFolder(path=out).report()


def test_a_run_is_fine_tuned_with_the_rate_that_lr_names_for_it(cut_alone: Path, tmp_path: Path) -> None:
    named = asked_rate(cut_alone, *ON_DIGITS)
    report = tuned(cut_alone, tmp_path / "tuned")
    assert report.lr is not None
    assert report.lr.model_dump(mode="json") == named
    top1 = {stage.name: stage.top1 or 0.0 for stage in RunFolder(path=cut_alone).report().stages}
    lost = (top1["dense"] - top1["recovered"]) / (top1["dense"] - 10)
    assert lost > 0.03
    assert named["evidence"]["lost_top1"] == pytest.approx(lost)
    assert named["evidence"]["removed_channels"] == pytest.approx(0.25, abs=0.02)
    again = asked_rate(tmp_path / "tuned", *ON_DIGITS)["evidence"]
    assert again["removed_channels"] == 0, "the run that fine-tuned it cut nothing"


def test_the_damage_of_a_run_that_fine_tuned_is_what_it_still_lacks(taught_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(taught_run, tmp_path / "run")
    report = json.loads((run / "report.json").read_text())
    assert report["stages"][-1]["name"] == "finetuned"
    report["stages"][-1]["top1"] = 0.5 * (report["base"]["top1"] + 10)
    (run / "report.json").write_text(json.dumps(report))
    assert asked_rate(run, *ON_DIGITS)["evidence"]["lost_top1"] == pytest.approx(0.5)


def test_a_run_that_lost_its_report_is_fine_tuned_and_told_so(cut_alone: Path, tmp_path: Path) -> None:
    run = shutil.copytree(cut_alone, tmp_path / "run")
    (run / "report.json").unlink()
    report = tuned(run, tmp_path / "tuned")
    assert report.lr is not None
    assert report.lr.inputs.removed_channels == 0
    assert any("report.json" in said and "uncut model" in said for said in report.warnings)
    assert "report.json" in sentence(call("lr", str(run), *ON_DIGITS))


def test_the_base_s_own_rate_is_read_from_the_recipe_of_the_run(cut_alone: Path, tmp_path: Path) -> None:
    assert asked_rate(cut_alone)["recommended"] == pytest.approx(0.04)
    assert asked_rate(cut_alone, "finetune.original={lr: 0.2, epochs: 200}")["recommended"] == pytest.approx(0.02)
    run = shutil.copytree(cut_alone, tmp_path / "run")
    (run / "recipe.yaml").write_text("model: cifar_resnet20.digits\na_key_of_another_version: 1\n")
    assert asked_rate(run)["recommended"] == pytest.approx(0.01)


@pytest.mark.parametrize(("lr", "expected"), [("auto", 7.1e-5), (0.5, 0.5)])
def test_a_start_that_is_to_be_probed_has_a_rate_of_its_own(tmp_path: Path, lr: Any, expected: float) -> None:
    recipe = Recipe.from_mapping(
        {
            "model": "cifar_resnet20.digits",
            "target": "ratio=0.5",
            "data": {"name": "digits", "train_limit": 128, "val_limit": 64},
            "finetune": {"epochs": 1, "optimizer": "adamw", "lr": lr},
            "prune": {"round_to": 1},
            "spectrum": {"samples": 0},
            "device": "cpu",
        }
    )
    job = open_job("compress", recipe, out=tmp_path / "run", resume=False, force=False, notify=lambda _: None)
    with job.closing:
        job.begin()
        source = job.source
        plan = plan_and_prove.plan_and_prove(source, recipe, job.images)[0].plan
        found = learning_rate_at(job, plan, source.model, 0.05)
    removed = [1 - len(group.keep) / group.width for group in plan.cut_groups]
    assert removed == pytest.approx([0.5] * len(removed), abs=0.05)
    assert found == pytest.approx(expected, rel=0.03)


def test_a_model_that_is_fine_tuned_alone_has_no_teacher(tmp_path: Path) -> None:
    job = [part for part in TEACHES if not part.startswith(("--target", "--recover"))]
    done = call("finetune", *job, f"--out={tmp_path / 'run'}")
    assert done.exit_code == 0, done.stderr
    report = RunFolder(path=tmp_path / "run").report()
    assert report.finetune is not None
    assert report.finetune.distill == 0


ALLR = ["finetune.schedule=allr", "finetune.original={lr: 0.1, epochs: 50}", "spectrum.samples=0"]


@pytest.mark.slow
def test_allr_reads_the_cut_and_the_report_shows_its_numbers(tmp_path: Path) -> None:
    done = call("compress", *JOB, *ALLR, "recover.steps=[]", f"--out={tmp_path / 'run'}")
    assert done.exit_code == 0, done.stderr
    folder = RunFolder(path=tmp_path / "run")
    report, plan = folder.report(), folder.plan()
    dense = load_model("lenet5_relu", pretrained=False).model.state_dict()
    norm = sum(float(tensor.double().square().sum()) for tensor in dense.values()) ** 0.5
    share = 1 - plan.predicted.params / plan.base.params
    assert report.lr is not None
    assert report.finetune is not None
    found = report.lr.inputs
    assert found.norm_dense == pytest.approx(norm)
    assert found.sparsity == pytest.approx(share)
    removed = (norm**2 - found.norm_pruned**2) ** 0.5 / norm
    assert 0.1 < removed < 0.9
    assert report.finetune.lr == report.lr.recommended == pytest.approx(max(0.1 * removed / share**0.5, 0.1 * 2 / 50))
    last = report.finetune.history[-1]["lr"]
    assert last == pytest.approx(report.finetune.lr / 14)  # 16 steps, 2 of them up
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "allr schedule" in page
    assert "norm removed" in page


def test_allr_without_a_cut_is_one_sentence(tmp_path: Path) -> None:
    plain = [part for part in JOB if not part.startswith("--target")]
    refused = call("finetune", *plain, *ALLR, f"--out={tmp_path / 'run'}")
    assert refused.exit_code == 2
    assert "which only `compress` knows" in sentence(refused)
    assert not (tmp_path / "run").exists()
    assert "which only `compress` knows" in sentence(call("lr", "lenet5_relu", "--no-pretrained", *ALLR))
