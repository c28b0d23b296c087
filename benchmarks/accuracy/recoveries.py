"""What to do about a cut before fine-tuning: recovery or TPP x pruning ratio x learning rate x seed, one budget.

ResNet-20 on CIFAR-10, L1 on the first convolution of each block, the tool's own steps, cosine SGD (batch 128, weight
decay 5e-4, crop and flip). ``tpp`` and ``greg`` train half of the epochs before the cut, by the phase of the packaged
recipe ``cifar10_resnet20_tpp_cpu``; ``+kd`` fine-tunes with distillation from the dense net (share 0.9, temperature 4),
``kd+`` lets it teach in the phase too; ``scratch`` is the cut net with random weights. A row is written as soon as it
is measured, so a run that was stopped goes on where it was:

    python benchmarks/accuracy/recoveries.py --weights cifar10_resnet20.safetensors --data-dir DIR
    python benchmarks/accuracy/recoveries.py --table

``--data-dir`` is a folder that torchvision's CIFAR-10 reads. The figures of ``before`` are those behind the recovery;
``jsv`` is the mean singular value of the Jacobian there. ``--set`` changes keys of the recipe; such rows stand apart.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch import nn

if not __package__:  # run as a program, from any folder
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from benchmarks.shared.ledger import Ledger
from benchmarks.shared.papers import fresh
from prunecli.measure.accuracy import evaluate
from prunecli.measure.jacobian import jacobian_spectrum
from prunecli.recipe import packaged
from prunecli.recipe.layers import layered, parse_assignments
from prunecli.recipe.methods import GregGrowing
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.settings import DistillSettings
from prunecli.recovery.steps import apply_steps
from prunecli.run import phases
from prunecli.run.job import Job, open_job
from prunecli.run.plan_and_prove import plan_and_prove
from prunecli.run.recovery_context import recovery_context
from prunecli.surgery.cut import cut
from prunecli.training import finetune
from prunecli.training.loop import TrainingRun
from prunecli.values.plan import Plan

RESULTS = Path(__file__).parents[1] / "results" / "recoveries.json"
ARMS = (
    "bn",
    "repair",
    "orthp+bn",
    "blend+bn",
    "lstsq+bn",
    "lstsq+blend+bn",
    "bn+kd",
    "lstsq+bn+kd",
    "tpp",
    "tpp+kd",
    "kd+tpp+kd",
    "kd+greg+kd",
    "scratch",
)
TEACHER = (0.9, 4.0)  # share and temperature of the distillation
JSV_IMAGES = 64
OWN = (  # keys of the recipe that this script sets or does not read
    *("model", "weights", "data", "target", "method.kind", "device", "seed", "recover"),
    *("finetune.distill", "finetune.lr", "finetune.epochs"),
)
Row = tuple[float, float, int, str]  # pruning ratio, learning rate, seed, arm


def recipe_for(options: argparse.Namespace, ratio: float, seed: int, arm: str) -> Recipe:
    """One job; its own recovery and learning rate are not read."""
    values = {
        "model": "cifar_resnet20",
        "weights": str(options.weights),
        "data": {
            "name": "torch/cifar10",
            "dir": str(options.data_dir),
            "train_limit": options.train_images,
            "val_limit": options.test_images,
        },
        "target": f"ratio={ratio}",
        "finetune": {"distill": teacher(options) if arm.startswith("kd") else {"alpha": 0.0}},
        "device": options.device,
        "seed": seed,
    }
    recipe = layered(packaged.read("cifar10_resnet20_tpp_cpu"), values, parse_assignments(options.set))
    return Recipe.from_mapping(recipe | {"method": method_of(arm, recipe["method"])})


def method_of(arm: str, tpp: Mapping[str, Any]) -> Mapping[str, Any]:
    """The method of an arm; ``greg`` has the figures of ``tpp`` that it knows."""
    if "tpp" in arm:
        return tpp
    if "greg" in arm:
        return {key: value for key, value in tpp.items() if key in GregGrowing.model_fields} | {"kind": "greg"}
    return {"kind": "oneshot"}


def owned(assignment: str) -> bool:
    """Whether ``KEY=VALUE`` names a key that only this script sets."""
    name = assignment.partition("=")[0]
    return any(name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for key in OWN)


def key(options: argparse.Namespace, row: Row) -> str:
    """The name of a row, budget included."""
    ratio, lr, seed, arm = row
    budget = f"{options.epochs} epochs of {options.train_images}, judged on {options.test_images}"
    changed = sorted(options.set)
    if tuple(options.teacher) != TEACHER and "kd" in arm:
        changed.append("teacher {} {}".format(*options.teacher))
    return " | ".join([arm, f"PR {ratio:g}", f"LR {lr:g}", f"seed {seed}", budget, *changed])


def teacher(options: argparse.Namespace) -> dict[str, float]:
    """Share and temperature of the distillation, as a recipe says them."""
    return dict(zip(("alpha", "temperature"), options.teacher, strict=True))


def started(job: Job, plan: Plan, arm: str) -> tuple[nn.Module, int]:
    """The net that fine-tuning starts from, and the epochs it has had."""
    if arm == "scratch":
        return fresh(cut(job.source.model, plan), job.recipe.seed), 0
    if job.recipe.method.kind == "oneshot":
        steps = tuple(step for step in arm.split("+") if step != "kd")
        context = recovery_context(job, job.source.model, plan)
        return apply_steps(context, cut(job.source.model, plan), steps).model, 0
    trained = phases.train_before_cut(job, plan)
    (phase,) = job.progress.phases
    return cut(trained, plan), round(phase.epochs)


def measure(job: Job, plan: Plan, row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Cut, recover, fine-tune, judge."""
    _, lr, seed, arm = row
    assert job.images is not None
    began = time.perf_counter()
    model, spent = started(job, plan, arm)
    seconds = time.perf_counter() - began
    images = job.images.calibration(JSV_IMAGES)[0].to(job.device)
    spectrum = jacobian_spectrum(model.to(job.device), images).summary
    before = evaluate(model, job.images.val_loader(), device=job.device)
    began = time.perf_counter()  # what was only looked at does not count
    settings = job.recipe.finetune
    distill = DistillSettings.model_validate(teacher(options) if arm.endswith("kd") else {"alpha": 0.0})
    done = finetune.finetune(
        model,
        job.images,
        settings.updated(distill=distill),
        lr=lr,
        epochs=options.epochs - spent,
        run=TrainingRun(device=job.device, seed=seed),
        teacher=job.source.model,
    )
    return {
        "before": before.top1,
        "jsv": float(f"{spectrum.mean:.4g}"),
        "condition": spectrum.condition and float(f"{spectrum.condition:.4g}"),
        "top1": done.last_top1,
        "best": done.best_top1,
        "loss": done.history[-1]["loss"],
        "epochs_before_cut": spent,
        "recovery_seconds": round(seconds, 2),
        "seconds": round(seconds + time.perf_counter() - began, 1),
    }


def run(options: argparse.Namespace) -> None:
    """Measure what the ledger lacks, rate by rate and ratio by ratio."""
    ledger = Ledger(options.out)
    for lr, ratio, seed, arm in itertools.product(options.lrs, options.ratios, options.seeds, options.arms):
        name = key(options, row := (ratio, lr, seed, arm))
        if name in ledger.records:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            recipe = recipe_for(options, ratio, seed, arm)
            job = open_job(
                "compress", recipe, out=Path(scratch) / "run", resume=False, force=False, notify=lambda _: None
            )
            with job.closing:
                job.begin()
                plan = plan_and_prove(job.source, recipe, job.images)[0].plan
                found = measure(job, plan, row, options)
        ledger.add({name: found}, device=job.device)
        print(f"{name}: {found}", flush=True)


def table(options: argparse.Namespace) -> str:
    """Markdown: a line for each arm and ratio; top-1 before and after, mean(standard deviation) over the seeds."""
    records = Ledger(options.out).records
    rates = "".join(f" LR {lr:g}: last | best |" for lr in options.lrs)
    lines = [f"| PR | recovery | seeds | before |{rates}", "|---|---|---|---|" + "---|---|" * len(options.lrs)]
    for ratio, arm in itertools.product(options.ratios, options.arms):
        per_rate = [
            [records[k] for seed in options.seeds if (k := key(options, (ratio, lr, seed, arm))) in records]
            for lr in options.lrs
        ]
        if not any(per_rate):
            continue
        counts = "/".join(str(len(rows)) for rows in per_rate)
        before = _spread([found["before"] for found in per_rate[0]])
        cells = "".join(
            f" {_spread([found['top1'] for found in rows])} | {_spread([found['best'] for found in rows])} |"
            for rows in per_rate
        )
        lines.append(f"| {ratio:g} | {arm} | {counts} | {before} |{cells}")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    """Mean, and the sample standard deviation where there are two."""
    if not values:
        return "not run"
    return f"{fmean(values):.2f}" + (f"({stdev(values):.2f})" if len(values) > 1 else "")


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; the defaults are the budget of the table in the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-2, 3e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--train-images", type=int, default=5_120)
    parser.add_argument("--test-images", type=int, default=2_000)
    parser.add_argument("--teacher", nargs=2, type=float, default=TEACHER, metavar=("SHARE", "TEMPERATURE"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args(arguments)
    if wrong := [assignment for assignment in asked.set if owned(assignment)]:
        parser.error(f"--set cannot change {wrong[0]}: an option of this script does, or nothing reads it")
    return asked


if __name__ == "__main__":
    chosen = parsed()
    if not chosen.table:
        run(chosen)
    print(table(chosen))
