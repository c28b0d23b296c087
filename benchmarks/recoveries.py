"""Which recovery is worth most after the same short fine-tuning: recovery x pruning ratio x learning rate x seed.

ResNet-20 on CIFAR-10, L1 on the first convolution of each block, the tool's own steps, cosine SGD (batch 128, weight
decay 5e-4, crop and flip). A row is written as soon as it is measured, so a run that was stopped goes on where it was:

    python benchmarks/recoveries.py --weights cifar10_resnet20.safetensors --data-dir DIR --out recoveries.json

``--data-dir`` is a folder that torchvision's CIFAR-10 reads. The figures of ``before`` are those behind the recovery.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ledger import Ledger

from prunecli import stages, train
from prunecli.evaluation import evaluate
from prunecli.graph import build_graph
from prunecli.job import Job, open_job
from prunecli.plan import Plan
from prunecli.recipe import Recipe
from prunecli.recovery_steps import Subject, apply_steps

RECOVERIES = ("none", "bn", "repair", "orthp+bn", "blend+bn", "lstsq", "lstsq+bn", "lstsq+blend+bn")
Row = tuple[float, float, int, str]  # pruning ratio, learning rate, seed, recovery


def recipe_for(options: argparse.Namespace, ratio: float, seed: int) -> Recipe:
    """One job; its own recovery and learning rate are not read."""
    return Recipe.from_mapping(
        {
            "model": "cifar_resnet20",
            "weights": str(options.weights),
            "data": {
                "name": "torch/cifar10",
                "dir": str(options.data_dir),
                "train_limit": options.train_images,
                "val_limit": options.test_images,
            },
            "target": f"ratio={ratio}",
            "prune": {"select": ["layer*.*.conv1"], "round_to": 1},
            "device": options.device,
            "seed": seed,
        }
    )


def key(options: argparse.Namespace, row: Row) -> str:
    """The name of a row, budget included."""
    ratio, lr, seed, recovery = row
    budget = f"{options.epochs} epochs of {options.train_images}, judged on {options.test_images}"
    return f"{recovery} | PR {ratio:g} | LR {lr:g} | seed {seed} | {budget}"


def measure(job: Job, plan: Plan, row: Row, epochs: int) -> dict[str, Any]:
    """Cut, recover, fine-tune, judge."""
    _, lr, seed, recovery = row
    assert job.images is not None
    began = time.perf_counter()
    model = stages.cut(job.source.model, plan)
    steps = () if recovery == "none" else tuple(recovery.split("+"))
    model = apply_steps(Subject(job=job, dense=job.source.model, plan=plan), model, steps).model
    seconds = time.perf_counter() - began
    before = evaluate(model, job.images.val_loader(), device=job.device)
    done = train.finetune(model, job.images, job.recipe.finetune, lr=lr, epochs=epochs, device=job.device, seed=seed)
    return {
        "before": before.top1,
        "top1": done.last_top1,
        "best": done.best_top1,
        "loss": done.history[-1]["loss"],
        "recovery_seconds": round(seconds, 2),
        "seconds": round(time.perf_counter() - began, 1),
    }


def run(options: argparse.Namespace) -> None:
    """Measure what the ledger lacks, ratio by ratio."""
    ledger = Ledger(options.out)
    for ratio, seed in itertools.product(options.ratios, options.seeds):
        rows = [(ratio, lr, seed, name) for lr in options.lrs for name in options.recoveries]
        rows = [row for row in rows if key(options, row) not in ledger.records]
        if not rows:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            recipe = recipe_for(options, ratio, seed)
            job = open_job(
                "compress", recipe, out=Path(scratch) / "run", resume=False, force=False, notify=lambda _: None
            )
            graph = build_graph(job.source.model, job.source.spec.size)
            plan = stages.make_plan(job.source, graph, recipe, job.images).plan
            for row in rows:
                found = measure(job, plan, row, options.epochs)
                ledger.add({key(options, row): found}, device=job.device)
                print(f"{key(options, row)}: {found}", flush=True)


def table(options: argparse.Namespace) -> str:
    """Markdown: a line for each recovery and ratio; before, then top-1 after each rate, mean over the seeds there."""
    records = Ledger(options.out).records
    rates = "".join(f" LR {lr:g} |" for lr in options.lrs)
    lines = [f"| recovery | PR | before |{rates}", "|---|---|---|" + "---|" * len(options.lrs)]
    for ratio, name in itertools.product(options.ratios, options.recoveries):
        per_rate = [
            [records[k] for seed in options.seeds if (k := key(options, (ratio, lr, seed, name))) in records]
            for lr in options.lrs
        ]
        before = _mean([found["before"] for rows in per_rate for found in rows])
        cells = "".join(f" {_mean([found['top1'] for found in rows])} |" for rows in per_rate)
        lines.append(f"| {name} | {ratio:g} | {before} |{cells}")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1f}" if values else "not run"


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; the defaults are the budget of the first look in the methods' notes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recoveries", nargs="+", choices=RECOVERIES, default=RECOVERIES)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.7, 0.9])
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 1e-2, 3e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--test-images", type=int, default=4_000)
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    chosen = parsed()
    run(chosen)
    print(table(chosen))
