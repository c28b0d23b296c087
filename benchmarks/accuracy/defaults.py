"""What the defaults are worth: ``prunecli compress`` as it comes, with one default off, and beside Torch-Pruning.

    OMP_NUM_THREADS=1 python benchmarks/accuracy/defaults.py --data-dir DIR --work DIR
    python benchmarks/accuracy/defaults.py --table

Every run halves the multiply-adds of a net that knows CIFAR-10 and fine-tunes it for four epochs of 5,000 images (crop
and flip, batch 128), judged on 4,000 test images behind the last epoch. The nets and their bases, trained here first,
are those of ``shared/cifar_nets.py``. *published rate* is 1e-2 for SGD, DeiT's rate scaled to the batch for AdamW.

* ``defaults``: nothing set but the target and the budget.
* ``fixed rate``, ``no recovery``, ``no teacher``: that one switched off (the rate: the published one), the others as
  they come; ``plain``: all three.
* ``torch-pruning``: its own pruner's cut (L1 magnitude, equal shares, heads pruned as its examples do), then the very
  training of ``plain``.

Finished runs are in the results file and not run again; several processes may fill it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a program, from any folder
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from benchmarks.shared.cifar_nets import CIFAR, CIFAR_IMAGES, recipe_for, trained_base
from benchmarks.shared.ledger import Ledger
from benchmarks.shared.own_job import recorded_job
from benchmarks.shared.papers import row
from benchmarks.shared.torch_pruning_cut import nearest_cut
from prunecli.measure import cost
from prunecli.measure.accuracy import evaluate
from prunecli.recipe.recipe import Recipe
from prunecli.run.source import load_source, open_images
from prunecli.training import finetune as finetuning
from prunecli.training.loop import TrainingRun
from prunecli.training.optimizer import optimizer_name
from prunecli.training.recommended_lr import recommend_lr
from prunecli.values.learning_rate import OptimizerName

RESULTS = Path(__file__).parents[1] / "results" / "defaults.json"
NETS = ("vgg11_bn", "test_convnext", "test_vit")
SEEDS = (0, 1, 2)
EPOCHS = 4
MACS_LEFT = 0.5

OFF: dict[str, dict[str, Any]] = {
    "fixed rate": {"finetune": {"lr": "published"}},
    "no recovery": {"recover": {"steps": ()}},
    "no teacher": {"finetune": {"distill": {"alpha": 0.0}}},
}
ARMS: dict[str, dict[str, Any]] = {
    "torch-pruning": {},
    "plain": {"finetune": {"lr": "published", "distill": {"alpha": 0.0}}, "recover": {"steps": ()}},
    **OFF,
    "defaults": {},
}


def key(net: str, arm: str, seed: int) -> str:
    """The name of one run's record."""
    return f"{net}/{arm}/seed={seed}"


def recipe_of(plain: Recipe, arm: str, seed: int, rate: float) -> Recipe:
    """The job of an arm, ``rate`` being the published one."""
    changes = copy.deepcopy(ARMS[arm])
    finetune = {**changes.get("finetune", {}), "epochs": EPOCHS}
    if finetune.get("lr") == "published":
        finetune["lr"] = rate
    values = {
        **plain.to_mapping(),
        **changes,
        "finetune": finetune,
        "target": f"macs={MACS_LEFT:.0%}",
        "seed": seed,
        "spectrum": {"samples": 0},
    }
    return Recipe.from_mapping(values)


def published_rate(optimizer: OptimizerName, batch_size: int) -> float:
    """What the tool takes where it knows nothing of the cut."""
    return recommend_lr(
        optimizer=optimizer,
        epochs=EPOCHS,
        batch_size=batch_size,
        small_images=True,
        removed_channels=MACS_LEFT,
        removed_params=MACS_LEFT,
    ).recommended


def theirs(recipe: Recipe, rate: float) -> dict[str, Any]:
    """Torch-Pruning's cut, trained by the same loop."""
    source = load_source(recipe)
    images = open_images(recipe, source)
    assert images is not None
    device = torch.device(recipe.device)
    net, _ = nearest_cut(source.model, source.spec.size, MACS_LEFT)
    pruned = evaluate(net, images.val_loader(), device=device).top1
    size = cost.measure(net, source.spec.size)
    done = finetuning.finetune(
        net,
        images,
        recipe.finetune,
        lr=rate,
        epochs=EPOCHS,
        run=TrainingRun(device=device, seed=recipe.seed),
        teacher=source.model,
    )
    return {
        "dense": evaluate(source.model, images.val_loader(), device=device).top1,
        "pruned": pruned,
        "top1": done.last_top1,
        "best": done.best_top1,
        "lr": rate,
        "macs": round(size.macs / source.cost.macs, 4),
        "params": round(size.params / source.cost.params, 4),
    }


def run(net: str, arm: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """One record."""
    plain = recipe_for(net, trained_base(net, asked), CIFAR_IMAGES, asked)
    dense = load_source(plain).model
    rate = published_rate(optimizer_name(plain.finetune, dense), plain.data.batch_size)
    if arm == "torch-pruning":
        return theirs(recipe_of(plain, "plain", seed, rate), rate)
    return recorded_job(recipe_of(plain, arm, seed, rate))


def table(records: Mapping[str, Any]) -> str:
    """Markdown: a row a net and arm of which every seed is there; the noise is the last epoch's standard error."""
    lines = [
        row(["net", "arm", "params", "MACs", "pruned", "recovered", "rate", "last", "best epoch", "noise"]),
        row(["---"] * 10),
    ]
    for net in NETS:
        for arm in ARMS:
            found = [records.get(key(net, arm, seed)) for seed in SEEDS]
            if all(found):
                lines.append(row([net, arm, *cells([record for record in found if record])]))
    return "\n".join(lines)


def cells(found: list[Mapping[str, Any]]) -> list[str]:
    """Means over the seeds, and the standard error of the last epoch's."""

    def mean(name: str) -> float:
        return statistics.fmean(record[name] for record in found)

    noise = statistics.stdev(record["top1"] for record in found) / len(found) ** 0.5
    return [
        f"{mean('params'):.1%}",
        f"{mean('macs'):.1%}",
        f"{mean('pruned'):.2f}",
        f"{mean('recovered'):.2f}" if all("recovered" in record for record in found) else "-",
        f"{mean('lr'):.2g}",
        f"{mean('top1'):.2f}",
        f"{mean('best'):.2f}",
        f"{noise:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with torchvision's CIFAR-10")
    parser.add_argument("--net", action="append", choices=NETS, help="repeatable; default: all")
    parser.add_argument("--arm", action="append", choices=ARMS, help="repeatable; default: all")
    parser.add_argument("--seed", action="append", type=int, help="repeatable; default: 0, 1 and 2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("papers_mnist_work"), help="bases, shared with lr_regret.py")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    ledger = Ledger(asked.results)
    if asked.table:
        print(table(ledger.records))
        return
    warnings.simplefilter("ignore")
    for seed in asked.seed or SEEDS:
        for net in asked.net or NETS:
            assert CIFAR[net].base is not None, "no checkpoint is needed"
            for arm in asked.arm or ARMS:
                if key(net, arm, seed) not in ledger.records:
                    ledger.add({key(net, arm, seed): run(net, arm, seed, asked)}, device=torch.device(asked.device))
                    print(key(net, arm, seed), ledger.records[key(net, arm, seed)], flush=True)


if __name__ == "__main__":
    main()
