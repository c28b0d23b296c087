"""How much accuracy a learning rate rule gives away: its pick against the best of a grid of seven, on many small cases.

    OMP_NUM_THREADS=1 python benchmarks/lr_regret.py --data-dir DIR --checkpoints DIR --work DIR
    python benchmarks/lr_regret.py --table

A case is a net, a pruning ratio and a budget of epochs, fine-tuned from each of the seven rates (SGD, momentum 0.9,
cosine to a hundredth of the peak). Regret of a rule: top-1 of the best of the seven, last epoch, mean over the seeds,
minus that of the grid's rate nearest to its pick. What a rule may look at lies beside the grid, and never comes from
test images: the damage, the budget, the losses of a range test. So a new rule is scored without any training.
Finished runs are in the results file and not run again. ``--data-dir`` is a folder that torchvision reads MNIST and
CIFAR-10 from, ``--checkpoints`` holds cifar10_resnet20.safetensors and cifar10_resnet56.safetensors.

MNIST nets train side by side in one process, on the first 20,000 images; their base is that of ``papers_mnist.py``. The
CIFAR nets go through the tool's own job (crop and flip), with BatchNorm re-estimated after the cut.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ledger import Ledger
from papers import Split, row
from papers_mnist import NETS, Bench, mnist, train_base
from side_by_side import Arm, SideBySide
from torch import Tensor, nn

from prunecli import stages, train
from prunecli.data import epoch_order
from prunecli.graph import build_graph
from prunecli.job import open_job
from prunecli.lr import recommend_lr, short_peak
from prunecli.recipe import FinetuneSettings, Recipe
from prunecli.recovery_steps import Subject, apply_steps
from prunecli.retraining import adaptive_peak
from prunecli.spectrum import jacobian_spectrum
from prunecli.zoo import load_model

RESULTS = Path(__file__).parent / "results" / "lr_regret.json"
GRID = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
BATCH, MNIST_IMAGES = 100, 20_000
CIFAR_IMAGES, CIFAR_TEST = 5_000, 4_000
RANGE_STEPS = 100
SGD = FinetuneSettings(optimizer="sgd", momentum=0.9, weight_decay=1e-4, decay_norms=True, schedule="cosine")
Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One net cut by a ratio and fine-tuned for some epochs."""

    net: str
    ratio: float
    epochs: int
    seeds: tuple[int, ...] = (0, 1, 2)

    def __str__(self) -> str:
        return f"{self.net}/PR {self.ratio:g}/{self.epochs} epochs"

    def key(self, lr: float, seed: int) -> str:
        """The name of one run's record."""
        return f"{self}/lr={lr:g}/seed={seed}"


CASES = (
    *(Case(net="mlp7_linear", ratio=r, epochs=e) for e in (3, 30) for r in (0.3, 0.5, 0.8, 0.9)),
    *(Case(net="mlp7_relu", ratio=r, epochs=e) for e in (3, 30) for r in (0.3, 0.5, 0.7, 0.9)),
    *(Case(net=net, ratio=r, epochs=3) for net in ("lenet5_relu", "lenet5_linear") for r in (0.5, 0.9)),
    *(Case(net="cifar_resnet20", ratio=r, epochs=1, seeds=(0,)) for r in (0.3, 0.5, 0.7, 0.9)),
    *(Case(net="cifar_resnet56", ratio=r, epochs=1, seeds=(0,)) for r in (0.5, 0.9)),
    *(Case(net="cifar_resnet20", ratio=r, epochs=4, seeds=(0,)) for r in (0.5, 0.9)),
)
BASE_PEAK = {"mlp7_linear": 0.01, "mlp7_relu": 0.01, "lenet5_linear": 0.01, "lenet5_relu": 0.01}  # ResNets: 0.1


def settings_for(lr: float) -> FinetuneSettings:
    """Of a run that starts at ``lr``."""
    return SGD.model_copy(update={"min_lr": lr / 100})


# ---------------------------------------------------------------------------------------------- what a rule may look at


def trial(net: nn.Module, batches: Batches, rates: Sequence[float]) -> list[float | None]:
    """The training loss of every step of a trial, one rate a step, each before that step; none once not finite."""
    model = copy.deepcopy(net).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=SGD.momentum, weight_decay=SGD.weight_decay)
    losses: list[float | None] = []
    for lr, (images, labels) in zip(rates, batches(), strict=False):
        optimizer.param_groups[0]["lr"] = lr
        loss = nn.functional.cross_entropy(model(images), labels)
        if not torch.isfinite(loss):
            losses.append(None)
            break
        losses.append(float(f"{loss.item():.4g}"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def range_losses(net: nn.Module, batches: Batches) -> dict[str, Any]:
    """Losses while the rate grows from 1e-5 to 10 by equal factors (Smith 2017, arXiv 1506.01186)."""
    rates = torch.logspace(-5, 1, RANGE_STEPS).tolist()
    return {"from": rates[0], "to": rates[-1], "losses": trial(net, batches, rates)}


def damage(dense: nn.Module, net: nn.Module, images: Tensor) -> dict[str, Any]:
    """Shares that left, norms and mean Jacobian singular values, from weights and some training images."""
    before, after = (sum(p.numel() for p in model.parameters()) for model in (dense, net))
    norms = [math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters())) for model in (dense, net)]
    means = [jacobian_spectrum(model.eval(), images).summary.mean for model in (dense, net)]
    return {
        "removed_params": round(1 - after / before, 4),
        "norm_dense": round(norms[0], 4),
        "norm_pruned": round(norms[1], 4),
        "jsv_dense": float(f"{means[0]:.4g}"),
        "jsv": float(f"{means[1]:.4g}"),
    }


def narrowest(dense: nn.Module, net: nn.Module) -> int:
    """Output channels left in the narrowest layer that was cut."""
    pairs = zip(dense.parameters(), net.parameters(), strict=True)
    return min(len(small) for full, small in pairs if len(small) < len(full))


# ---------------------------------------------------------------------------------------------- MNIST


def run_mnist(case: Case, bench: Bench) -> None:
    """All runs of one case at once."""
    if not bench.base_file.is_file():
        train_base(bench)
    first, test = bench.data
    images = Split(images=first.images[:MNIST_IMAGES], labels=first.labels[:MNIST_IMAGES])
    dense, net = load_model(case.net, weights=str(bench.base_file)).model, bench.pruned(case.ratio)
    steps = case.epochs * (MNIST_IMAGES // BATCH)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count():
            for rows in epoch_order(MNIST_IMAGES, seed=0, epoch=epoch).split(BATCH):
                yield images.images[rows], images.labels[rows]

    found = {
        "steps": steps,
        "epochs": case.epochs,
        "batch_size": BATCH,
        "removed_channels": case.ratio,
        "narrowest_width": narrowest(dense, net),
        **damage(dense, net, images.images[:256]),
        "base_peak_lr": BASE_PEAK[case.net],
        "dense_top1": round(bench.accuracy(dense), 3),
        "start": round(bench.accuracy(net), 3),
        "range_test": range_losses(net, batches),
    }
    start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    arms = [Arm(starts=[start] * len(case.seeds), lr=lr, settings=settings_for(lr)) for lr in GRID]
    stack = SideBySide(net, arms, images, seeds=case.seeds, epochs=case.epochs, batch_size=BATCH, device=bench.device)
    reached = []
    for _ in range(case.epochs):
        stack.train_epoch()
        reached.append(stack.top1(test))
    names = [case.key(lr, seed) for seed in case.seeds for lr in GRID]
    runs = {
        name: {"top1": round(values[-1], 3), "best": round(max(values), 3)}
        for name, values in zip(names, zip(*reached, strict=True), strict=True)
    }
    bench.ledger.add({**runs, str(case): found}, device=bench.device)


# ---------------------------------------------------------------------------------------------- CIFAR-10


def recipe_for(case: Case, asked: argparse.Namespace) -> Recipe:
    """The job that one case starts from."""
    name = case.net.replace("cifar_", "cifar10_")
    data = {"name": "torch/cifar10", "dir": asked.data_dir, "train_limit": CIFAR_IMAGES, "val_limit": CIFAR_TEST}
    return Recipe.from_mapping(
        {
            "model": case.net,
            "weights": str(Path(asked.checkpoints) / f"{name}.safetensors"),
            "data": data,
            "target": f"ratio={case.ratio}",
            "prune": {"select": ["layer*.*.conv1"], "round_to": 1},
            "device": asked.device,
        }
    )


def run_cifar(case: Case, asked: argparse.Namespace, ledger: Ledger) -> None:
    """The runs of one case that the ledger lacks, one after the other."""
    recipe = recipe_for(case, asked)
    with tempfile.TemporaryDirectory() as scratch:
        job = open_job("compress", recipe, out=Path(scratch) / "run", resume=False, force=False, notify=lambda _: None)
        assert job.images is not None
        images, dense = job.images, job.source.model
        plan = stages.make_plan(job.source, build_graph(dense, job.source.spec.size), recipe, images).plan
        net = apply_steps(Subject(job=job, dense=dense, plan=plan), stages.cut(dense, plan), ("bn",)).model
        if str(case) not in ledger.records:
            ledger.add({str(case): cifar_inputs(case, images, dense, net)}, device=job.device)
        for seed, lr in itertools.product(case.seeds, GRID):
            if case.key(lr, seed) in ledger.records:
                continue
            done = train.finetune(
                copy.deepcopy(net), images, settings_for(lr), lr=lr, epochs=case.epochs, device=job.device, seed=seed
            )
            ledger.add({case.key(lr, seed): {"top1": done.last_top1, "best": done.best_top1}}, device=job.device)
            print(case.key(lr, seed), done.last_top1, flush=True)


def cifar_inputs(case: Case, images: Any, dense: nn.Module, net: nn.Module) -> dict[str, Any]:
    """What a rule may look at, and the accuracy before any fine-tuning."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count():
            yield from images.train_loader(epoch=epoch)

    steps = case.epochs * images.steps_per_epoch
    device = next(net.parameters()).device
    return {
        "steps": steps,
        "epochs": case.epochs,
        "batch_size": len(next(batches())[1]),
        "removed_channels": case.ratio,
        "narrowest_width": narrowest(dense, net),
        **damage(dense, net, images.calibration(64)[0]),
        "base_peak_lr": 0.1,
        "dense_top1": train.evaluate(dense, images.val_loader(), device=device).top1,
        "start": train.evaluate(net, images.val_loader(), device=device).top1,
        "range_test": range_losses(net, batches),
    }


# ---------------------------------------------------------------------------------------------- rules and their regret


def fixed(lr: float) -> Callable[[dict[str, Any]], float]:
    return lambda _: lr


def allr(case: dict[str, Any]) -> float:
    """The first rate of ALLR (Zimmer et al. 2023); the bases trained for 90 (MNIST) and 200 epochs (CIFAR)."""
    return adaptive_peak(
        peak=case["base_peak_lr"],
        norm_dense=case["norm_dense"],
        norm_pruned=case["norm_pruned"],
        sparsity=case["removed_params"],
        epochs=case["epochs"],
        original_epochs=90 if case["base_peak_lr"] < 0.1 else 200,
    )


def range_test(case: dict[str, Any]) -> float:
    """A tenth of the rate at which the smoothed loss is lowest, on the pruned net."""
    losses = [loss for loss in case["range_test"]["losses"] if loss is not None]
    smooth, smoothed = 0.0, []
    for step, loss in enumerate(losses, 1):
        smooth = 0.9 * smooth + 0.1 * loss
        smoothed.append(smooth / (1 - 0.9**step))
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    rates = torch.logspace(math.log10(case["range_test"]["from"]), math.log10(case["range_test"]["to"]), RANGE_STEPS)
    return float(rates[lowest]) / 10


def published(case: dict[str, Any]) -> float:
    """The tool's published rules alone, as they hold for longer budgets; the base's own rate is not known to them."""
    return _recommended(case, steps=None)


def prunecli(case: dict[str, Any]) -> float:
    """What ``--lr auto`` takes."""
    return _recommended(case, steps=case["steps"])


def _recommended(case: dict[str, Any], *, steps: int | None) -> float:
    return recommend_lr(
        optimizer="sgd",
        epochs=case["epochs"],
        batch_size=case["batch_size"],
        small_images=True,
        removed_channels=case["removed_channels"],
        removed_params=case["removed_params"],
        steps=steps,
    ).recommended


RULES: dict[str, Callable[[dict[str, Any]], float]] = {
    "fixed 1e-2": fixed(0.01),
    "fixed 1e-3": fixed(0.001),
    "ALLR": allr,
    "range test": range_test,
    "published rules": published,
    "prunecli": prunecli,
}


def top1(case: Case, records: dict[str, Any], which: str = "top1") -> dict[float, float]:
    """Mean over the seeds, by rate."""
    return {lr: statistics.fmean(records[case.key(lr, seed)][which] for seed in case.seeds) for lr in GRID}


def nearest(lr: float) -> float:
    """The grid's rate with the smallest ratio to ``lr``."""
    return min(GRID, key=lambda rate: abs(math.log(rate / lr)))


def regret(case: Case, records: dict[str, Any], lr: float) -> float:
    """Points of top-1 that the grid's rate nearest to ``lr`` stays below the best one."""
    reached = top1(case, records)
    return max(reached.values()) - reached[nearest(lr)]


def noise(case: Case, records: dict[str, Any]) -> float | None:
    """Standard error of the best rate's mean; none with one seed."""
    reached = top1(case, records)
    values = [records[case.key(max(GRID, key=reached.__getitem__), seed)]["top1"] for seed in case.seeds]
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def left_out(cases: Sequence[Case], records: dict[str, Any]) -> dict[Case, float]:
    """The rule's rate for every case, its two constants fitted to the cases of the other nets only."""
    choices = tuple(itertools.product(GRID, (1, 75, 150, 300, 600, 1200, 2400)))

    def rate(case: Case, peak: float, annealing: float) -> float:
        return short_peak(records[str(case)]["steps"], case.ratio, peak=peak, annealing=annealing)

    found = {}
    for net in {case.net for case in cases}:
        others = [case for case in cases if case.net != net]
        best = min(
            choices, key=lambda choice: statistics.fmean(regret(case, records, rate(case, *choice)) for case in others)
        )
        found |= {case: rate(case, *best) for case in cases if case.net == net}
    return found


def table(records: dict[str, Any]) -> str:
    """Markdown: regret of every rule in every finished case, then mean and worst."""
    cases = [case for case in CASES if finished(case, records)]
    held_out = left_out(cases, records)
    regrets = {
        **{rule: [regret(c, records, pick(records[str(c)])) for c in cases] for rule, pick in RULES.items()},
        "prunecli, fitted to other nets": [regret(c, records, held_out[c]) for c in cases],
    }
    lines = [
        row(["case", "steps", "seeds", "best rate", "last", "best epoch", "noise", *regrets]),
        row(["---"] * (7 + len(regrets))),
    ]
    for place, case in enumerate(cases):
        reached, error = top1(case, records), noise(case, records)
        best = max(GRID, key=reached.__getitem__)
        start = [str(case), str(records[str(case)]["steps"]), str(len(case.seeds)), f"{best:g}", f"{reached[best]:.2f}"]
        start += [f"{top1(case, records, 'best')[best]:.2f}", "-" if error is None else f"{error:.2f}"]
        lines.append(row([*start, *(f"{values[place]:.2f}" for values in regrets.values())]))
    for title, over in (("mean", statistics.fmean), ("median", statistics.median), ("worst", max)):
        lines.append(row([title, *[""] * 6, *(f"{over(values):.2f}" for values in regrets.values())]))
    return "\n".join(lines)


def finished(case: Case, records: dict[str, Any]) -> bool:
    """Whether the records hold all of it."""
    runs = (case.key(lr, seed) for seed in case.seeds for lr in GRID)
    return str(case) in records and all(name in records for name in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with torchvision's MNIST and CIFAR-10")
    parser.add_argument("--checkpoints", help="folder with the CIFAR ResNets")
    parser.add_argument("--net", action="append", help="repeatable; default: all")
    parser.add_argument("--epochs", type=int, action="append", help="repeatable; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--work", type=Path, default=Path("papers_mnist_work"), help="bases, shared with papers_mnist.py"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    ledger = Ledger(asked.results)
    if asked.table:
        print(table(ledger.records))
        return
    for case in CASES:
        if case.net not in (asked.net or [case.net]) or case.epochs not in (asked.epochs or [case.epochs]):
            continue
        if finished(case, ledger.records):
            continue
        if case.net in NETS:
            data = mnist(asked.data_dir, asked.work / "mnist.safetensors")
            run_mnist(
                case, Bench(net=case.net, data=data, work=asked.work, ledger=ledger, device=torch.device(asked.device))
            )
        else:
            run_cifar(case, asked, ledger)
        print(case, {lr: round(mean, 2) for lr, mean in top1(case, ledger.records).items()}, flush=True)


if __name__ == "__main__":
    main()
