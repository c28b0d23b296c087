r"""What a short training makes of a cut: the same cuts as ``no_training.py``, after 1, 3 and 10 epochs.

    OMP_NUM_THREADS=1 python benchmarks/accuracy/short_training.py --work DIR --data-dir CIFAR --checkpoints DIR \
        --photographs DIR --arms tp tp-taught before --epochs 1 3
    … --arm new "prune.criterion=… prune.ranking=… recover.steps=[auto]"
    python benchmarks/accuracy/short_training.py --table

An arm of prunecli is a job of ``prunecli compress`` with these changes of the recipe; all else is as it comes: rate,
teacher, schedule. The nets on CIFAR-10 see 5,000 images an epoch and are judged on 4,000 test images behind the last
epoch. The ImageNet nets get the ten rows of their classifier that ``imagenette`` has, see its 2,500 training images and
are judged on its 500 others. Torch-Pruning's cut (L1, equal shares) goes through the very same training loop:

* ``tp``: at the published rate and without a teacher, as its users would train it;
* ``tp-taught``: at the rate that prunecli recommends for what this cut lost, with the teacher.

Finished rows are in the results file and not run again.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

if not __package__:  # run as a program, from any folder
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from benchmarks.shared.ledger import Ledger
from benchmarks.shared.own_job import recorded_job
from benchmarks.shared.papers import row
from benchmarks.shared.subjects import (
    ARMS,
    BEFORE,
    IMAGENET,
    Subject,
    add_sources,
    own_arms,
    recipe_of,
    silence_,
    subject,
    ten_classes,
    train_missing,
)
from benchmarks.shared.torch_pruning_cut import nearest_cut
from prunecli.data.images import Images
from prunecli.errors import PruneError, one_line
from prunecli.measure import cost
from prunecli.measure.accuracy import evaluate, halves_chance_error, lost_top1
from prunecli.models.source import Source
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.schedules import CosineSchedule
from prunecli.recipe.settings import DistillSettings, FinetuneSettings
from prunecli.run.learning_rate import DISTILL_SHARE
from prunecli.run.source import load_source, open_images
from prunecli.training import finetune as finetuning
from prunecli.training.loop import TrainingRun
from prunecli.training.optimizer import optimizer_name
from prunecli.training.recommended_lr import recommend_lr
from prunecli.values.learning_rate import LRReport

RESULTS = Path(__file__).parents[1] / "results" / "short_training.json"
TP, TP_TAUGHT = "tp", "tp-taught"


def key(net: str, target: str, epochs: int, arm: str, seed: int) -> str:
    """The name of one row's record."""
    return f"{net}/{target}/{epochs} epochs/{arm}/seed={seed}"


def theirs(found: Subject, recipe: Recipe, *, taught: bool) -> dict[str, Any]:
    """Torch-Pruning's cut, trained by the same loop."""
    source = load_source(recipe)
    images = open_images(recipe, source)
    assert images is not None
    assert recipe.finetune.epochs is not None
    device, goal = torch.device(recipe.device), recipe.target
    assert goal is not None
    assert goal.metric in ("macs", "params")
    net, ratio = nearest_cut(source.model, source.spec.size, goal.value, metric=goal.metric, whole=found.whole)
    size = cost.measure(net, source.spec.size)
    dense, pruned = (evaluate(model, images.val_loader(), device=device).top1 for model in (source.model, net))
    share = DISTILL_SHARE if taught and halves_chance_error(dense, images.num_classes) else 0.0
    rate = rate_for(recipe, net, images, source, ratio=ratio, tops=(dense, pruned) if taught else None, share=share)
    done = finetuning.finetune(
        net,
        images,
        settings_at(recipe, rate, share),
        lr=rate.recommended,
        epochs=recipe.finetune.epochs,
        run=TrainingRun(device=device, seed=recipe.seed),
        teacher=source.model,
    )
    return {
        "dense": dense,
        "pruned": pruned,
        "top1": done.last_top1,
        "best": done.best_top1,
        "lr": float(f"{rate.recommended:.3g}"),
        "macs": round(size.macs / source.cost.macs, 4),
        "params": round(size.params / source.cost.params, 4),
    }


def rate_for(
    recipe: Recipe,
    net: nn.Module,
    images: Images,
    source: Source,
    *,
    ratio: float,
    tops: tuple[float, float] | None,
    share: float,
) -> LRReport:
    """The rate for a cut that is not prunecli's own.

    Args:
        recipe: the job.
        net: cut net.
        images: training and test images.
        source: dense net.
        ratio: share of the channels that left.
        tops: top-1 of the dense net and of the cut one; ``None`` for the published rate, which knows nothing of it.
        share: share of the loss that is distillation.
    """
    epochs = recipe.finetune.epochs or 0
    left = sum(tensor.numel() for tensor in net.parameters()) / source.cost.params
    return recommend_lr(
        optimizer=optimizer_name(recipe.finetune, net),
        epochs=epochs,
        batch_size=recipe.data.batch_size,
        small_images=max(source.spec.size[1:]) <= 64,
        removed_channels=ratio,
        removed_params=max(0.0, 1 - left),
        steps=epochs * images.steps_per_epoch if tops else None,
        lost_top1=lost_top1(*tops, classes=images.num_classes) if tops else None,
        distill_share=share,
        distill_temperature=recipe.finetune.distill.temperature,
    )


def settings_at(recipe: Recipe, rate: LRReport, share: float) -> FinetuneSettings:
    """The recipe's settings with final rate and teacher resolved, as a job does it."""
    asked = recipe.finetune
    return asked.updated(
        schedule=CosineSchedule(min_lr=rate.final_lr),
        distill=DistillSettings(alpha=share, temperature=asked.distill.temperature),
    )


def measure(found: Subject, target: str, epochs: int, arm: str, seed: int, changes: Sequence[str]) -> dict[str, Any]:
    """One row, with the processor time that it took."""
    recipe = recipe_of(found.recipe, target, seed, changes, {"finetune": {"epochs": epochs}})
    began = time.process_time()
    try:
        record = theirs(found, recipe, taught=arm == TP_TAUGHT) if arm in (TP, TP_TAUGHT) else recorded_job(recipe)
    except PruneError as reason:
        record = {"problem": one_line(reason)}
    return {**record, "set": list(changes), "seconds": round(time.process_time() - began, 1)}


def run(asked: argparse.Namespace, arms: Mapping[str, Sequence[str]], ledger: Ledger) -> None:
    """Measure what the ledger lacks, net by net."""
    for net in asked.nets:
        rows = itertools.product(asked.epochs, asked.targets, asked.seeds, arms)
        missing = [r for r in rows if key(net, r[1], r[0], r[3], r[2]) not in ledger.records]
        if not missing:
            continue
        found = ten_classes(net, asked) if net in IMAGENET else subject(net, asked)
        for epochs, target, seed, arm in missing:
            name = key(net, target, epochs, arm, seed)
            ledger.add({name: measure(found, target, epochs, arm, seed, arms[arm])}, device=torch.device(asked.device))
            print(name, ledger.records[name], flush=True)


def table(records: Mapping[str, Any], asked: argparse.Namespace) -> str:
    """Markdown: a line a net, target, budget and arm; means over the seeds, and the last epoch's standard error."""
    columns = ["net (dense)", "target", "epochs", "arm", "seeds", "params", "before", "rate", "last", "best", "noise"]
    lines = [row(columns), row(["---"] * len(columns))]
    arms = sorted({name.split("/")[3] for name in records}, key=lambda arm: (arm not in (TP, TP_TAUGHT), arm != BEFORE))
    for net, target, epochs, arm in itertools.product(asked.nets, asked.targets, asked.epochs, arms):
        prefix = key(net, target, epochs, arm, 0).removesuffix("0")
        found = [record for name, record in records.items() if name.startswith(prefix)]
        if found:
            known = [f"{record['dense']:.2f}" for record in found if "dense" in record]
            title = f"{net} ({known[0]})" if known else net
            lines.append(row([title, target, str(epochs), arm, str(len(found)), *cells(found)]))
    return "\n".join(lines)


def cells(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means over the seeds; *before* is what the training starts from."""
    if any("problem" in record for record in found):
        return ["fails", *["-"] * 5]

    def mean(name: str) -> float:
        return statistics.fmean(record[name] for record in found)

    start = statistics.fmean(record.get("recovered", record["pruned"]) for record in found)
    last = [record["top1"] for record in found]
    noise = f"{statistics.stdev(last) / len(last) ** 0.5:.2f}" if len(last) > 1 else "-"
    shown = [f"{mean('params'):.1%}", f"{start:.2f}", f"{mean('lr'):.2g}", f"{mean('top1'):.2f}"]
    return [*shown, f"{mean('best'):.2f}", noise]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser, arms=(TP, TP_TAUGHT, *ARMS), results=RESULTS)
    parser.add_argument("--epochs", nargs="+", type=int, default=(1, 3, 10))
    asked = parser.parse_args()
    ledger = Ledger(asked.results)
    if asked.table:
        print(table(ledger.records, asked))
        return
    silence_()
    if asked.train_nets:
        train_missing(asked)
        return
    run(asked, {**{arm: ARMS.get(arm, ()) for arm in asked.arms}, **own_arms(asked)}, ledger)


if __name__ == "__main__":
    main()
