"""How much accuracy a learning rate rule gives away: its pick against the best of a grid of seven, on many small cases.

    OMP_NUM_THREADS=1 python benchmarks/accuracy/lr_regret.py --data-dir DIR --checkpoints DIR --work DIR
    python benchmarks/accuracy/lr_regret.py --table

A case is a net, a pruning ratio and a budget of epochs, fine-tuned from each of the seven rates (cosine to a hundredth
of the peak; SGD with momentum 0.9, or AdamW). Regret of a rule: top-1 of the best of the seven, last epoch, mean over
the seeds, minus that of the grid's rate nearest to its pick. What a rule may look at lies beside the grid: the damage,
the budget, the losses of a range test; nothing of test images but the accuracy before any fine-tuning, dense and
pruned. So a new rule is scored without any training.

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
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # run as a program, from any folder
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy.papers_mnist import NETS, Bench, mnist, train_base
from benchmarks.shared.cifar_nets import CIFAR, CIFAR_IMAGES, SETTINGS, Base, opened, recipe_for, trained_base
from benchmarks.shared.ledger import Ledger
from benchmarks.shared.papers import Split, row
from benchmarks.shared.side_by_side import Arm, SideBySide
from prunecli.data.images import Images, epoch_order
from prunecli.errors import DivergedError
from prunecli.measure.accuracy import evaluate, lost_top1
from prunecli.measure.jacobian import jacobian_spectrum
from prunecli.models.load import load_model
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.schedules import CosineSchedule
from prunecli.recipe.settings import DistillSettings, FinetuneSettings
from prunecli.recovery.steps import apply_steps, has_batch_norm
from prunecli.run.job import Job
from prunecli.run.plan_and_prove import plan_and_prove
from prunecli.run.recovery_context import recovery_context
from prunecli.run.source import open_images
from prunecli.surgery.cut import cut
from prunecli.training import finetune
from prunecli.training.loop import TrainingRun
from prunecli.training.optimizer import build_optimizer
from prunecli.training.recommended_lr import (
    distillation_gain,
    kind_of,
    recommend_lr,
    short_peak,
    short_peak_adamw,
)
from prunecli.training.retraining_rates import RemovedWeights, adaptive_peak
from prunecli.values.learning_rate import OptimizerName

RESULTS = Path(__file__).parents[1] / "results" / "lr_regret.json"
GRIDS = {
    "sgd": (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003),
    "adamw": (0.01, 0.003, 0.001, 0.0003, 0.0001, 0.00003, 0.00001),
}
BATCH, MNIST_IMAGES = 100, 20_000
RANGE_STEPS = 100
TRIAL_SHARE = 0.05  # of the fine-tuning's steps, for three trials
TRIAL_STEPS = 10  # a shorter trial says nothing
TEACHER = DistillSettings(alpha=0.9, temperature=4.0)
Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


MNIST_PEAK = 0.01


@dataclass(frozen=True, kw_only=True)
class Case:
    """One net cut by a ratio and fine-tuned for some epochs."""

    net: str
    ratio: float
    epochs: int
    seeds: tuple[int, ...] = (0, 1, 2)
    taught: bool = False  # distilled from the dense net, as ``compress`` does by default
    solved: bool = False  # by least squares (recovery step ``lstsq``) before the fine-tuning

    def __str__(self) -> str:
        return f"{self.net}/PR {self.ratio:g}/{self.epochs} epochs" + "/taught" * self.taught + "/lstsq" * self.solved

    @property
    def kind(self) -> str:
        """Cases of one kind share a table."""
        return kind_of(self.optimizer, taught=self.taught)

    @property
    def optimizer(self) -> OptimizerName:
        """What trains it."""
        return CIFAR[self.net].optimizer if self.net in CIFAR else "sgd"

    @property
    def grid(self) -> tuple[float, ...]:
        """The seven rates."""
        return GRIDS[self.optimizer]

    @property
    def base_peak(self) -> float:
        """The highest rate that the base was trained at."""
        return CIFAR[self.net].peak if self.net in CIFAR else MNIST_PEAK

    @property
    def base_epochs(self) -> float:
        """How long the base was trained, in epochs of the case's own images: those of MNIST 90 of 60,000 images, the
        published CIFAR checkpoints 200 of 50,000.
        """
        if self.net not in CIFAR:
            return 90 * 60_000 / MNIST_IMAGES
        base = CIFAR[self.net].base or Base(epochs=200, images=50_000)
        return base.epochs * base.images / CIFAR_IMAGES

    def settings(self, lr: float) -> FinetuneSettings:
        """Of the run that starts at ``lr``."""
        distill = TEACHER if self.taught else DistillSettings()
        return SETTINGS[self.optimizer].updated(schedule=CosineSchedule(min_lr=lr / 100), distill=distill)

    def key(self, lr: float, seed: int) -> str:
        """The name of one run's record."""
        return f"{self}/lr={lr:g}/seed={seed}"


RATIOS = (0.3, 0.5, 0.7, 0.9)
CASES = (
    *(Case(net="mlp7_linear", ratio=r, epochs=e) for e in (3, 30) for r in (0.3, 0.5, 0.8, 0.9)),
    *(Case(net="mlp7_relu", ratio=r, epochs=e) for e in (3, 30) for r in (0.3, 0.5, 0.7, 0.9)),
    *(Case(net=net, ratio=r, epochs=3) for net in ("lenet5_relu", "lenet5_linear") for r in (0.5, 0.9)),
    *(Case(net="cifar_resnet20", ratio=r, epochs=1, seeds=(0,)) for r in RATIOS),
    *(Case(net="cifar_resnet56", ratio=r, epochs=1, seeds=(0,)) for r in (0.5, 0.9)),
    *(Case(net="cifar_resnet20", ratio=r, epochs=4, seeds=(0,)) for r in (0.5, 0.9)),
    *(Case(net="vgg11_bn", ratio=r, epochs=e, seeds=(0,)) for e in (1, 4) for r in (0.5, 0.9)),
    *(Case(net=net, ratio=r, epochs=1) for net in ("test_convnext", "test_vit") for r in (0.5, 0.9)),
    *(Case(net=net, ratio=r, epochs=4, seeds=(0,)) for net in ("test_convnext", "test_vit") for r in (0.5, 0.9)),
    *(Case(net="test_convnext", ratio=r, epochs=16, seeds=(0,)) for r in (0.5, 0.9)),
    *(
        Case(net=net, ratio=r, epochs=e, seeds=(0,), solved=True)
        for net in ("test_convnext", "test_vit")
        for e in (1, 4)
        for r in (0.5, 0.9)
    ),
    *(Case(net="cifar_resnet20", ratio=r, epochs=e, seeds=(0,), taught=True) for e in (1, 4) for r in RATIOS),
    *(
        Case(net=net, ratio=r, epochs=e, seeds=(0,), taught=True)
        for net in ("test_convnext", "test_vit")
        for e in (1, 4)
        for r in (0.5, 0.9)
    ),
)


# ---------------------------------------------------------------------------------------------- what a rule may look at


def trial(net: nn.Module, batches: Batches, rates: Sequence[float], settings: FinetuneSettings) -> list[float | None]:
    """The training loss of every step of a trial, one rate a step, each before that step; none once not finite."""
    model = copy.deepcopy(net).train()
    optimizer = build_optimizer(model, settings, lr=rates[0])
    losses: list[float | None] = []
    for lr, (images, labels) in zip(rates, batches(), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = nn.functional.cross_entropy(model(images), labels)
        if not torch.isfinite(loss):
            losses.append(None)
            break
        losses.append(float(f"{loss.item():.4g}"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def range_losses(net: nn.Module, batches: Batches, settings: FinetuneSettings) -> dict[str, Any]:
    """Losses while the rate grows by equal factors (Smith 2017, arXiv 1506.01186): to 10, AdamW to 1."""
    rates = torch.logspace(-5, 1 if settings.optimizer == "sgd" else 0, RANGE_STEPS).tolist()
    return {"from": rates[0], "to": rates[-1], "losses": trial(net, batches, rates, settings)}


def trial_losses(case: Case, net: nn.Module, batches: Batches, steps: int) -> dict[str, Any]:
    """How low the loss gets in short fine-tunings from each rate, three of which take a twentieth of the budget.

    Each has the whole schedule in that time. The loss is the mean over the last tenth of the steps, on images that the
    trial has not seen before; it is that of the labels, so there are no trials with a teacher.
    """
    each = 0 if case.taught else int(TRIAL_SHARE * steps / 3)
    last = -(-each // 10)
    ends = {}
    for lr in case.grid if each else ():
        rates = Arm(starts=(), lr=lr, settings=case.settings(lr)).rates(1, each).tolist()
        losses = trial(net, batches, rates, case.settings(lr))
        seen = [loss for loss in losses[-last:] if loss is not None and losses[-1] is not None]
        ends[f"{lr:g}"] = float(f"{statistics.fmean(seen):.4g}") if seen else None
    return {"steps": each, "losses": ends}


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


def inputs(
    case: Case, dense: nn.Module, net: nn.Module, calibration: Tensor, batches: Batches, *, steps: int
) -> dict[str, Any]:
    """Budget, damage and trials of a case, from weights and training images."""
    return {
        "steps": steps,
        "epochs": case.epochs,
        "batch_size": len(next(batches())[1]),
        "removed_channels": case.ratio,
        "narrowest_width": narrowest(dense, net),
        **damage(dense, net, calibration),
        "optimizer": case.optimizer,
        "distill_share": case.settings(1.0).distill.share,
        "distill_temperature": TEACHER.temperature,
        "base_peak_lr": case.base_peak,
        "base_epochs": case.base_epochs,
        "range_test": range_losses(net, batches, SETTINGS[case.optimizer]),
        "trials": trial_losses(case, net, batches, steps),
    }


# ---------------------------------------------------------------------------------------------- MNIST


def run_mnist(case: Case, bench: Bench) -> None:
    """All runs of one case at once."""
    if not bench.base_file.is_file():
        train_base(bench)
    first, test = bench.data
    images = Split(images=first.images[:MNIST_IMAGES], labels=first.labels[:MNIST_IMAGES])
    net = bench.pruned(case.ratio)
    if not inputs_known(case, bench.ledger.records):
        bench.ledger.add({str(case): mnist_inputs(case, bench, images, net)}, device=bench.device)
    if finished(case, bench.ledger.records):
        return
    start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    arms = [Arm(starts=[start] * len(case.seeds), lr=lr, settings=case.settings(lr)) for lr in case.grid]
    stack = SideBySide(net, arms, images, seeds=case.seeds, epochs=case.epochs, batch_size=BATCH, device=bench.device)
    reached = []
    for _ in range(case.epochs):
        stack.train_epoch()
        reached.append(stack.top1(test))
    names = [case.key(lr, seed) for seed in case.seeds for lr in case.grid]
    runs = {
        name: {"top1": round(values[-1], 3), "best": round(max(values), 3)}
        for name, values in zip(names, zip(*reached, strict=True), strict=True)
    }
    bench.ledger.add(runs, device=bench.device)


def mnist_inputs(case: Case, bench: Bench, images: Split, net: nn.Module) -> dict[str, Any]:
    """What a rule may look at, and the accuracy before any fine-tuning."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count():
            for rows in epoch_order(MNIST_IMAGES, seed=0, epoch=epoch).split(BATCH):
                yield images.images[rows], images.labels[rows]

    dense = load_model(case.net, weights=str(bench.base_file)).model
    return {
        **inputs(case, dense, net, images.images[:256], batches, steps=case.epochs * (MNIST_IMAGES // BATCH)),
        "dense_top1": round(bench.accuracy(dense), 3),
        "start": round(bench.accuracy(net), 3),
    }


# ---------------------------------------------------------------------------------------------- CIFAR-10


def run_cifar(case: Case, asked: argparse.Namespace, ledger: Ledger) -> None:
    """The runs of one case that the ledger lacks, one after the other."""
    plain = recipe_for(case.net, trained_base(case.net, asked), CIFAR_IMAGES, asked)
    prune = {"select": (CIFAR[case.net].select,), "round_to": 1}
    recipe = Recipe.from_mapping({**plain.to_mapping(), "target": f"ratio={case.ratio}", "prune": prune})
    with opened(recipe) as job:
        assert job.images is not None
        images, dense = job.images, job.source.model
        plan = plan_and_prove(job.source, recipe, images)[0].plan
        steps = ("lstsq",) * case.solved + ("bn",) * has_batch_norm(dense)
        net = apply_steps(recovery_context(job, dense, plan), cut(dense, plan), steps).model
        if not inputs_known(case, ledger.records):
            ledger.add({str(case): cifar_inputs(case, images, dense, net)}, device=job.device)
        for seed, lr in itertools.product(case.seeds, case.grid):
            if case.key(lr, seed) in ledger.records:
                continue
            shuffled = open_images(recipe.model_copy(update={"seed": seed}), job.source)
            assert shuffled is not None
            ledger.add(
                {case.key(lr, seed): cifar_run(case, job, copy.deepcopy(net), shuffled, dense, lr, seed)},
                device=job.device,
            )
            print(case.key(lr, seed), ledger.records[case.key(lr, seed)], flush=True)


def cifar_run(
    case: Case, job: Job, net: nn.Module, images: Images, dense: nn.Module, lr: float, seed: int
) -> dict[str, float]:
    """Top-1 after the fine-tuning; that of guessing where the loss is no number."""
    try:
        done = finetune.finetune(
            net,
            images,
            case.settings(lr),
            lr=lr,
            epochs=case.epochs,
            run=TrainingRun(device=job.device, seed=seed),
            teacher=dense,
        )
    except DivergedError as reason:
        print(case.key(lr, seed), reason, flush=True)
        return {"top1": 100 / images.num_classes, "best": 100 / images.num_classes}
    assert done.last_top1 is not None
    assert done.best_top1 is not None
    return {"top1": done.last_top1, "best": done.best_top1}


def cifar_inputs(case: Case, images: Images, dense: nn.Module, net: nn.Module) -> dict[str, Any]:
    """What a rule may look at, and the accuracy before any fine-tuning."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count():
            yield from images.train_loader(epoch=epoch)

    device = next(net.parameters()).device
    return {
        **inputs(case, dense, net, images.calibration(64)[0], batches, steps=case.epochs * images.steps_per_epoch),
        "dense_top1": evaluate(dense, images.val_loader(), device=device).top1,
        "start": evaluate(net, images.val_loader(), device=device).top1,
    }


# ---------------------------------------------------------------------------------------------- rules and their regret


def fixed(lr: float) -> Callable[[dict[str, Any]], float]:
    return lambda _: lr


def allr(case: dict[str, Any]) -> float:
    """The first rate of ALLR (Zimmer et al. 2023)."""
    removed = RemovedWeights(
        sparsity=case["removed_params"], norm_dense=case["norm_dense"], norm_pruned=case["norm_pruned"]
    )
    peak, epochs, original_epochs = case["base_peak_lr"], case["epochs"], case["base_epochs"]
    return adaptive_peak(removed, peak=peak, epochs=epochs, original_epochs=original_epochs)


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


def trials(case: dict[str, Any]) -> float:
    """The grid's rate nearest to prunecli's or one of the two below it, by the loss that trial runs end with;
    prunecli's own where the budget is too short for trials.
    """
    pick, ends = prunecli(case), case["trials"]["losses"]
    if case["trials"]["steps"] < TRIAL_STEPS:
        return pick
    grid = GRIDS[case["optimizer"]]
    place = grid.index(nearest(pick, grid))
    judged = [lr for lr in grid[place : place + 3] if ends.get(f"{lr:g}") is not None]
    return min(judged, key=lambda lr: ends[f"{lr:g}"]) if judged else pick


def published(case: dict[str, Any]) -> float:
    """The tool's published rules alone, as they hold for longer budgets; the base's own rate is not known to them."""
    return _recommended(case, steps=None)


def prunecli(case: dict[str, Any]) -> float:
    """What ``--lr auto`` takes."""
    return _recommended(case, steps=case["steps"])


def lost(case: dict[str, Any]) -> float | None:
    """Share of the dense top-1 above guessing that is gone before fine-tuning."""
    return lost_top1(case["dense_top1"], case["start"], classes=10)


def _recommended(case: dict[str, Any], *, steps: int | None) -> float:
    return recommend_lr(
        optimizer=case["optimizer"],
        epochs=case["epochs"],
        batch_size=case["batch_size"],
        small_images=True,
        removed_channels=case["removed_channels"],
        removed_params=case["removed_params"],
        steps=steps,
        lost_top1=lost(case),
        distill_share=case["distill_share"],
        distill_temperature=case["distill_temperature"],
    ).recommended


MEASURED: dict[str, Callable[[dict[str, Any]], float]] = {
    "ALLR": allr,
    "range test": range_test,
    "published rules": published,
    "prunecli": prunecli,
    "prunecli, then trials": trials,
}
RULES = {
    "sgd": {"fixed 1e-2": fixed(0.01), "fixed 1e-3": fixed(0.001), **MEASURED},
    "adamw": {"fixed 1e-3": fixed(0.001), "fixed 1e-4": fixed(0.0001), **MEASURED},
}


# What the constants of the rule of short fine-tunings are chosen from.
CONSTANTS = {
    "sgd": (GRIDS["sgd"], (1, 75, 150, 300, 600, 1200, 2400)),
    "adamw": ((1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),),
}


def top1(case: Case, records: dict[str, Any], which: str = "top1") -> dict[float, float]:
    """Mean over the seeds, by rate."""
    return {lr: statistics.fmean(records[case.key(lr, seed)][which] for seed in case.seeds) for lr in case.grid}


def nearest(lr: float, grid: Sequence[float]) -> float:
    """The grid's rate with the smallest ratio to ``lr``."""
    return min(grid, key=lambda rate: abs(math.log(rate / lr)))


def regret(case: Case, records: dict[str, Any], lr: float) -> float:
    """Points of top-1 that the grid's rate nearest to ``lr`` stays below the best one."""
    reached = top1(case, records)
    return max(reached.values()) - reached[nearest(lr, case.grid)]


def noise(case: Case, records: dict[str, Any]) -> float | None:
    """Standard error of the best rate's mean; none with one seed."""
    reached = top1(case, records)
    values = [records[case.key(max(case.grid, key=reached.__getitem__), seed)]["top1"] for seed in case.seeds]
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def left_out(cases: Sequence[Case], records: dict[str, Any]) -> dict[Case, float]:
    """The rule's rate for every case, its constants fitted to the cases of the other nets only; needs two nets."""
    nets = {case.net for case in cases}
    if len(nets) == 1:
        return {}
    choices = tuple(itertools.product(*CONSTANTS[cases[0].optimizer]))
    found: dict[Case, float] = {}
    for net in nets:
        others = [case for case in cases if case.net != net]
        best = min(
            choices,
            key=lambda choice: statistics.fmean(
                regret(case, records, short_rate(case, records[str(case)], *choice)) for case in others
            ),
        )
        found |= {case: short_rate(case, records[str(case)], *best) for case in cases if case.net == net}
    return found


def short_rate(case: Case, known: dict[str, Any], peak: float, annealing: float = 0.0) -> float:
    """The rule of short fine-tunings with these constants."""
    gain = distillation_gain(known["distill_share"], known["distill_temperature"])
    if case.optimizer == "adamw":
        gone = lost(known)
        assert gone is not None
        return short_peak_adamw(case.ratio, gone, peak=peak) * gain
    return short_peak(known["steps"], case.ratio, peak=peak, annealing=annealing) / gain


def table(records: dict[str, Any], kind: str) -> str:
    """Markdown: regret of every rule in every finished case of one kind, then mean and worst."""
    cases = [case for case in CASES if case.kind == kind and finished(case, records)]
    rules = RULES[cases[0].optimizer]
    regrets = {rule: [regret(c, records, pick(records[str(c)])) for c in cases] for rule, pick in rules.items()}
    if held_out := left_out(cases, records):
        regrets["prunecli, fitted to other nets"] = [regret(c, records, held_out[c]) for c in cases]
    lines = [
        row(["case", "steps", "seeds", "best rate", "last", "best epoch", "noise", *regrets]),
        row(["---"] * (7 + len(regrets))),
    ]
    for place, case in enumerate(cases):
        reached, error = top1(case, records), noise(case, records)
        best = max(case.grid, key=reached.__getitem__)
        start = [str(case), str(records[str(case)]["steps"]), str(len(case.seeds)), f"{best:g}", f"{reached[best]:.2f}"]
        start += [f"{top1(case, records, 'best')[best]:.2f}", "-" if error is None else f"{error:.2f}"]
        lines.append(row([*start, *(f"{values[place]:.2f}" for values in regrets.values())]))
    for title, over in (("mean", statistics.fmean), ("median", statistics.median), ("worst", max)):
        lines.append(row([title, *[""] * 6, *(f"{over(values):.2f}" for values in regrets.values())]))
    return "\n".join(lines)


def inputs_known(case: Case, records: dict[str, Any]) -> bool:
    """Whether the records hold what a rule may look at."""
    return "trials" in records.get(str(case), {})


def finished(case: Case, records: dict[str, Any]) -> bool:
    """Whether the records hold all of it."""
    runs = (case.key(lr, seed) for seed in case.seeds for lr in case.grid)
    return inputs_known(case, records) and all(name in records for name in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with torchvision's MNIST and CIFAR-10")
    parser.add_argument("--checkpoints", help="folder with the CIFAR ResNets")
    parser.add_argument("--net", action="append", help="repeatable; default: all")
    parser.add_argument("--epochs", type=int, action="append", help="repeatable; default: all")
    parser.add_argument("--taught", action="store_true", help="only the cases with a teacher")
    parser.add_argument("--solved", action="store_true", help="only the cases after least squares")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--work", type=Path, default=Path("papers_mnist_work"), help="bases, shared with papers_mnist.py"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    ledger = Ledger(asked.results)
    if asked.table:
        kinds = {case.kind: None for case in CASES if finished(case, ledger.records)}
        if not kinds:
            parser.error(f"{asked.results} has no finished case")
        for kind in kinds:
            print(f"{kind}\n\n{table(ledger.records, kind)}\n")
        return
    for case in CASES:
        if case.net not in (asked.net or [case.net]) or case.epochs not in (asked.epochs or [case.epochs]):
            continue
        if finished(case, ledger.records) or asked.taught > case.taught or asked.solved > case.solved:
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
