"""The MNIST tables of "Dynamical Isometry: The Missing Ingredient for Neural Network Pruning" (arXiv 2105.05916).

MLP-7-Linear (PR 0.8), MLP-7-ReLU and LeNet-5 with and without ReLU (PR 0.9; LeNet's three convolutions): the base by
the 90-epoch schedule from 1e-2, mean Jacobian singular value against the pruning ratio, then fine-tuning with and
without OrthP at two learning rates beside the same small net from PyTorch's own initialisation, three seeds, 90 epochs;
and plain L1 for 900 epochs. The cut, OrthP, the spectra and the schedules are prunecli's; training is
``side_by_side``, the same arithmetic as ``train.finetune`` for many runs at once.

    OMP_NUM_THREADS=1 python benchmarks/accuracy/papers_mnist.py --data-dir DIR    (torchvision's MNIST below DIR)
    OMP_NUM_THREADS=1 python benchmarks/accuracy/papers_mnist.py --data-dir DIR --net mlp7_linear --long
    python benchmarks/accuracy/papers_mnist.py --table

Finished runs are in the results file and not run again; one under way goes on from its last save (every ten epochs).
Several processes may fill one file, each with a ``--net`` of its own.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

if not __package__:  # run as a program, from any folder
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from benchmarks.shared.ledger import Ledger
from benchmarks.shared.papers import Split, fresh, pruned, row, spread, stacked
from benchmarks.shared.side_by_side import Arm, SideBySide, State
from prunecli.data.images import epoch_order, open_data
from prunecli.files import read_tensors, write_tensors
from prunecli.measure.jacobian import jacobian_spectrum
from prunecli.models.build import input_spec
from prunecli.models.load import load_model
from prunecli.recipe.schedules import StepSchedule
from prunecli.recipe.settings import DataSettings, FinetuneSettings
from prunecli.recovery.orthogonal import orthogonalize_

RESULTS = Path(__file__).parents[1] / "results" / "papers_mnist.json"
BATCH = 100
SEEDS = (0, 1, 2)
JSV_IMAGES = 10 * BATCH
JSV_AFTER = (1, 2, 5, 10)
RATIOS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
SAVE_EVERY = 10
SGD = FinetuneSettings(optimizer="sgd", momentum=0.9, weight_decay=1e-4, decay_norms=True)
# The papers' schedules, as shares of the budget: 0:1e-2, 30:1e-3, 60:1e-4 and 0:1e-3, 45:1e-4 of 90 epochs.
MILESTONES = {0.01: (1 / 3, 2 / 3), 0.001: (0.5,)}
METHODS = ("L1", "L1+OrthP", "Scratch")


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One net: its pruning ratio, the layers that are cut, and the published mean JSV by ratio (two bases)."""

    ratio: float
    select: tuple[str, ...]
    jsv: Mapping[float, float]


NETS = {
    "mlp7_linear": Paper(
        ratio=0.8,
        select=("*",),
        jsv={0.0: 2.4987, 0.1: 1.7132, 0.3: 0.5325, 0.5: 0.1180, 0.7: 0.0151, 0.9: 0.0004},
    ),
    "mlp7_relu": Paper(
        ratio=0.9, select=("*",), jsv={0.0: 1.828, 0.1: 1.667, 0.3: 1.259, 0.5: 0.628, 0.7: 0.134, 0.9: 0.0056}
    ),
    "lenet5_linear": Paper(
        ratio=0.9, select=("conv*",), jsv={0.0: 3.745, 0.1: 3.372, 0.3: 2.552, 0.5: 1.517, 0.7: 0.4225, 0.9: 0.1127}
    ),
    "lenet5_relu": Paper(
        ratio=0.9, select=("conv*",), jsv={0.0: 3.005, 0.1: 2.862, 0.3: 2.595, 0.5: 1.843, 0.7: 0.695, 0.9: 0.185}
    ),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all tables of one net share."""

    net: str
    data: tuple[Split, Split]
    work: Path
    ledger: Ledger
    device: torch.device
    base: int = 0

    @property
    def title(self) -> str:
        """The net, and which base where it is not the first."""
        return f"{self.net} (base {self.base})" if self.base else self.net

    @property
    def base_file(self) -> Path:
        return self.work / f"{self.net}_base{self.base}.safetensors"

    def mean_jsv(self, model: nn.Module) -> float:
        """Over ten batches of 100 training images, eval mode, as the paper's code takes it."""
        images = self.data[0].images[:JSV_IMAGES].to(self.device)
        return jacobian_spectrum(model.to(self.device), images).summary.mean

    def accuracy(self, model: nn.Module) -> float:
        test = self.data[1].to(self.device)
        with torch.no_grad():
            logits = torch.cat([model.to(self.device).eval()(images) for images in test.images.split(1000)])
        return 100 * float((logits.argmax(1) == test.labels).double().mean())

    def pruned(self, ratio: float) -> nn.Module:
        """A smaller copy of the base: filters with the smallest L1 norm leave each layer, by prunecli's own plan."""
        return pruned(self.net, self.base_file, ratio, select=NETS[self.net].select)


# ---------------------------------------------------------------------------------------------- data


def mnist(folder: str, cache: Path) -> tuple[Split, Split]:
    """Training and test images as the tool itself reads them (28 to 32 pixels, normalised), in the data set's order."""
    if not cache.is_file():
        settings = DataSettings(name="torch/mnist", dir=folder, batch_size=1000, augment="none")
        images = open_data(
            settings, input_spec(load_model("mlp7_linear", pretrained=False).ref), num_classes=10, seed=0
        )
        shuffled = stacked(images.train_loader(epoch=0))
        place = epoch_order(images.train_size, seed=0, epoch=0).argsort()
        test = stacked(images.val_loader())
        parts = {"x": shuffled.images[place], "y": shuffled.labels[place], "test_x": test.images, "test_y": test.labels}
        write_tensors(cache, parts)
    parts = read_tensors(cache)
    return Split(images=parts["x"], labels=parts["y"]), Split(images=parts["test_x"], labels=parts["test_y"])


# ---------------------------------------------------------------------------------------------- runs


def key(net: str, method: str, lr: float, epochs: int, seed: int) -> str:
    return f"{net}/{method}/lr={lr:g}/epochs={epochs}/seed={seed}"


def train_together(
    bench: Bench, net: nn.Module, arms: Mapping[tuple[str, float], Arm], *, epochs: int, seeds: Sequence[int]
) -> tuple[dict[str, dict[str, Any]], list[State]]:
    """Train every arm for every seed; records by key, and the final weights in the same order. Resumable."""
    runs = [key(bench.title, method, lr, epochs, seed) for seed in seeds for method, lr in arms]
    train, test = bench.data
    stack = SideBySide(
        net, list(arms.values()), train, seeds=seeds, epochs=epochs, batch_size=BATCH, device=bench.device
    )
    path = bench.work / f"{bench.net}_{bench.base}_{epochs}_{len(runs)}.safetensors"
    job = stack.resume(path, runs=runs) or {"runs": runs, "top1": [], "jsv": {}}
    if stack.epoch == 0:
        job["start"] = stack.top1(test)
        job["jsv"]["0"] = _jsv(bench, net, stack, len(runs))
    while stack.epoch < epochs:
        stack.train_epoch()
        job["top1"].append(stack.top1(test))
        if stack.epoch in (*JSV_AFTER, epochs):
            job["jsv"][str(stack.epoch)] = _jsv(bench, net, stack, len(runs))
        if stack.epoch % SAVE_EVERY == 0:
            stack.save(path, job)
            print(f"{bench.title} {epochs} epochs: {stack.epoch} done, {job['top1'][-1]}", flush=True)
    records = {run: _record(job, place, stack.rates[place % len(arms)]) for place, run in enumerate(runs)}
    return records, [stack.state(run) for run in range(len(runs))]


def _jsv(bench: Bench, net: nn.Module, stack: SideBySide, runs: int) -> list[float]:
    found = []
    for run in range(runs):
        model = copy.deepcopy(net).to(bench.device)
        model.load_state_dict(stack.state(run))
        found.append(bench.mean_jsv(model))
    return found


def _record(job: Mapping[str, Any], run: int, rates: torch.Tensor) -> dict[str, Any]:
    """The figures of one run; trainability is the mean accuracy over the epochs of the first rate."""
    curve = [top1[run] for top1 in job["top1"]]
    first_stage = round(float((rates == rates[0]).double().mean()) * len(curve))
    shown = {epoch for epoch in (1, 2, 5, *range(10, len(curve) + 1, max(10, len(curve) // 18))) if epoch <= len(curve)}
    return {
        "start": round(job["start"][run], 3),
        "last": round(curve[-1], 3),
        "best": round(max(curve), 3),
        "best_epoch": 1 + curve.index(max(curve)),
        "trainability": round(statistics.fmean(curve[:first_stage]), 3),
        "first_stage": first_stage,
        "top1": {str(epoch): round(curve[epoch - 1], 3) for epoch in sorted(shown)},
        "jsv": {epoch: float(f"{values[run]:.4g}") for epoch, values in job["jsv"].items()},
    }


def settings_for(lr: float) -> FinetuneSettings:
    return SGD.updated(schedule=StepSchedule(milestones=MILESTONES[lr]))


def train_base(bench: Bench) -> None:
    """The dense net from PyTorch's own initialisation; the last epoch is the base."""
    name = key(bench.title, "Base", 0.01, 90, bench.base)
    if name in bench.ledger.records and bench.base_file.is_file():
        return
    net = load_model(bench.net, pretrained=False, seed=bench.base).model
    arm = Arm(starts=[net.state_dict()], lr=0.01, settings=settings_for(0.01))
    records, states = train_together(bench, net, {("Base", 0.01): arm}, epochs=90, seeds=(bench.base,))
    write_tensors(bench.base_file, states[0])
    bench.ledger.add(records, device=bench.device)


def jsv_table(bench: Bench) -> None:
    """Mean JSV and accuracy right after the cut, by pruning ratio."""
    missing = [ratio for ratio in RATIOS if f"{bench.title}/cut/{ratio:g}" not in bench.ledger.records]
    found = {}
    for ratio in missing:
        model = bench.pruned(ratio)
        widths = [len(tensor) for name, tensor in model.named_parameters() if name.endswith("weight")]
        found[f"{bench.title}/cut/{ratio:g}"] = {
            "jsv": float(f"{bench.mean_jsv(model):.4g}"),
            "top1": round(bench.accuracy(model), 3),
            "widths": widths,
        }
    if found:
        bench.ledger.add(found, device=bench.device)


def starts_of(bench: Bench, method: str, seeds: Sequence[int]) -> list[State]:
    """The weights each seed starts from; only a fresh initialisation differs between seeds."""
    model = bench.pruned(NETS[bench.net].ratio)
    if method == "Scratch":
        return [fresh(model, seed).state_dict() for seed in seeds]
    if method == "L1+OrthP":
        orthogonalize_(model, "qr")
    return [model.state_dict()] * len(seeds)


def finetune_table(bench: Bench, *, epochs: int, methods: Sequence[str], seeds: Sequence[int]) -> None:
    """All arms that are not in the results yet, side by side."""
    known = bench.ledger.records
    asked = [(method, lr) for method in methods for lr in MILESTONES]
    missing = [arm for arm in asked if any(key(bench.title, *arm, epochs, seed) not in known for seed in seeds)]
    seeds = [seed for seed in seeds if any(key(bench.title, *arm, epochs, seed) not in known for arm in missing)]
    if not missing:
        return
    net = bench.pruned(NETS[bench.net].ratio)
    arms = {
        (method, lr): Arm(starts=starts_of(bench, method, seeds), lr=lr, settings=settings_for(lr))
        for method, lr in missing
    }
    records, _ = train_together(bench, net, arms, epochs=epochs, seeds=seeds)
    bench.ledger.add(records, device=bench.device)


# ---------------------------------------------------------------------------------------------- tables


def tables(records: Mapping[str, Mapping[str, Any]]) -> str:
    """All tables as Markdown."""
    return "\n\n".join(filter(None, [_cut_table(records), *(_net_table(records, title) for title in titles(records))]))


def titles(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The nets that there are figures of, a further base behind its net."""
    order = list(NETS)
    return sorted({name.split("/")[0] for name in records}, key=lambda title: (order.index(title.split()[0]), title))


def _cut_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [row(["net", "", *(f"PR {ratio:g}" for ratio in (0.0, *RATIOS))]), "|---" * (len(RATIOS) + 3) + "|"]
    for title in titles(records):
        paper, bases = NETS[title.split()[0]], [name for name in records if name.startswith(f"{title}/Base/")]
        base = records[bases[0]] if bases else None
        cuts = [records.get(f"{title}/cut/{ratio:g}") for ratio in RATIOS]
        if base is None or None in cuts:
            continue
        here = [base["jsv"]["90"], *(found["jsv"] for found in cuts if found)]
        top1 = [base["last"], *(found["top1"] for found in cuts if found)]
        published = [paper.jsv.get(ratio) for ratio in (0.0, *RATIOS)]
        lines.append(row([title, "published JSV", *("" if v is None else f"{v:g}" for v in published)]))
        lines.append(row(["", "mean JSV", *(f"{v:.3g}" for v in here)]))
        lines.append(row(["", "top-1", *(f"{v:.2f}" for v in top1)]))
    return "\n".join(lines)


def _net_table(records: Mapping[str, Mapping[str, Any]], title: str) -> str:
    arms = sorted(
        {tuple(name.split("/")[1:4]) for name in records if name.startswith(f"{title}/") and "/seed=" in name},
        key=lambda arm: (int(arm[2].removeprefix("epochs=")), arm[0] != "Base", arm[0], arm[1] == "lr=0.001"),
    )
    columns = (
        "",
        "epochs",
        "LR",
        "seeds",
        "best",
        "last",
        "before",
        "after 1",
        "TA",
        "JSV at 0 / 1 / 2 / 5 / 10 / last",
    )
    lines = [
        f"**{title}**, PR {NETS[title.split(maxsplit=1)[0]].ratio:g}",
        "",
        row(columns),
        "|---" * len(columns) + "|",
    ]
    for method, lr, epochs in arms:
        runs = [r for name, r in sorted(records.items()) if name.startswith(f"{title}/{method}/{lr}/{epochs}/")]
        last = epochs.removeprefix("epochs=")
        jsv = [statistics.fmean(run["jsv"][at] for run in runs) for at in ("0", *map(str, JSV_AFTER), last)]
        cells = [
            *(method, last, lr.removeprefix("lr="), str(len(runs))),
            *(spread([run[which] for run in runs]) for which in ("best", "last")),
            f"{statistics.fmean(run['start'] for run in runs):.2f}",
            f"{statistics.fmean(run['top1']['1'] for run in runs):.2f}",
            f"{statistics.fmean(run['trainability'] for run in runs):.2f} ({runs[0]['first_stage']} ep)",
            " / ".join(f"{value:.3g}" for value in jsv),
        ]
        lines.append(row(cells))
    return "\n".join(lines) if arms else ""


def bands(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The acceptance test of MLP-7-Linear at 90 epochs, best accuracy, one line a claim; empty before the runs."""

    def best(method: str, lr: float) -> float:
        runs = [records.get(key("mlp7_linear", method, lr, 90, seed)) for seed in SEEDS]
        return statistics.fmean(run["best"] for run in runs) if all(runs) else math.nan  # type: ignore[index]

    orthp, l1 = (best("L1+OrthP", 0.01), best("L1+OrthP", 0.001)), (best("L1", 0.01), best("L1", 0.001))
    if any(map(math.isnan, (*orthp, *l1))):
        return []
    claims = [
        ("L1+OrthP, 1e-3 is at least 92.5", orthp[1], orthp[1] >= 92.5),
        ("L1, 1e-2 lies in 91.0 to 91.7", l1[0], 91.0 <= l1[0] <= 91.7),
        ("L1, 1e-3 lies in 90.2 to 90.9", l1[1], 90.2 <= l1[1] <= 90.9),
        ("after OrthP the two rates differ by at most 0.2", orthp[0] - orthp[1], abs(orthp[0] - orthp[1]) <= 0.2),
    ]
    return [f"{'holds' if holds else 'FAILS'}: {claim} ({value:.2f})" for claim, value, holds in claims]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with torchvision's MNIST (MNIST/raw/…)")
    parser.add_argument("--net", action="append", choices=NETS, help="repeatable; default: all")
    parser.add_argument("--long", action="store_true", help="the 900-epoch rows of plain L1, not the table")
    parser.add_argument("--method", action="append", choices=METHODS, help="repeatable; default: all, --long: L1")
    parser.add_argument("--base", type=int, default=0, help="seed of the base's own training")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tuning seeds; a later call with more adds the rest")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("papers_mnist_work"), help="bases and saved positions")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    asked = parser.parse_args()
    ledger, seeds = Ledger(asked.results), range(asked.seeds)
    if not asked.table:
        if not asked.data_dir:
            parser.error("--data-dir is needed")
        data = mnist(asked.data_dir, asked.work / "mnist.safetensors")
        methods = asked.method or (("L1",) if asked.long else METHODS)
        device = torch.device(asked.device)
        for net in asked.net or NETS:
            bench = Bench(net=net, data=data, work=asked.work, ledger=ledger, device=device, base=asked.base)
            train_base(bench)
            jsv_table(bench)
            finetune_table(bench, epochs=900 if asked.long else 90, methods=methods, seeds=seeds)
    print(tables(ledger.records))
    print("\n".join(bands(ledger.records)))


if __name__ == "__main__":
    main()
