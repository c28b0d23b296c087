r"""ResNet-56 on CIFAR-10: rows Scratch, L1, L1+OrthP and TPP of the table in TPP (arXiv 2207.12534), PR 0.3 to 0.95.

The first convolution of each block is cut by L1 norm; fine-tuning for 120 epochs from 1e-2 (a tenth after 60 and 90) or
1e-3 (a tenth after 80), Scratch for 200 epochs from 0.1 (a tenth after 100 and 150), batch 128, SGD 0.9, weight decay
5e-4 on all parameters, crop and flip. The cut, OrthP, the schedules and the augmentation are prunecli's.

    python benchmarks/accuracy/resnet56.py --data-dir DIR --weights resnet56.safetensors --device cuda --minutes 28
    python benchmarks/accuracy/resnet56.py --list
    python benchmarks/accuracy/resnet56.py --table

Runs are taken from one list, all arms of seed 0 first, ``--together`` at a time. Those in the results file are not run
again, those under way go on from their last save (every ten epochs, and at the end of ``--minutes``), so the table
fills over several occasions; the file may be shared by several processes given different ``--only`` patterns.

TPP trains before it cuts, and that is the tool's own phase. A TPP row starts from the run that

    prunecli compress --recipe papers/resnet56_tpp_conv1 --weights … --data-dir … \
        --target ratio=0.7 --epochs 0 seed=0 --out TPP/0.7-0

leaves behind (the ratio and the seed name the folder), and is open only where ``--tpp TPP`` has that folder.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

if not __package__:  # run as a program, from any folder
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from benchmarks.shared.ledger import Ledger
from benchmarks.shared.papers import Split, fresh, pruned, row, spread, stacked
from benchmarks.shared.resident import Course, Resident
from prunecli.data.images import epoch_order, open_data
from prunecli.measure.jacobian import jacobian_spectrum
from prunecli.models.build import input_spec
from prunecli.models.load import load_model
from prunecli.recipe.schedules import StepSchedule
from prunecli.recipe.settings import DataSettings, FinetuneSettings
from prunecli.recovery.orthogonal import orthogonalize_
from prunecli.run.export import load_exported
from prunecli.run.folder import RunFolder

RESULTS = Path(__file__).parents[1] / "results" / "resnet56.json"
NET = "cifar_resnet56"
BATCH = 128
SEEDS = 3
JSV_IMAGES = 64
SAVE_EVERY = 10
RATIOS = (0.3, 0.5, 0.7, 0.9, 0.95)
SGD = FinetuneSettings(optimizer="sgd", momentum=0.9, weight_decay=5e-4, decay_norms=True)
BASE = 93.39  # of the checkpoint, on all test images; the papers' base has 93.78


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the table: start, schedule, and what was published (mean of the best epoch over 3 runs, by ratio)."""

    start: str
    lr: float
    epochs: int
    milestones: tuple[float, ...]
    published: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.start}, {self.lr:g}"


ARMS = (
    Arm(
        start="Scratch",
        lr=0.1,
        epochs=200,
        milestones=(0.5, 0.75),
        published=("93.16(0.16)", "92.78(0.23)", "92.11(0.12)", "88.36(0.20)", "84.60(0.14)"),
    ),
    Arm(
        start="L1",
        lr=0.01,
        epochs=120,
        milestones=(0.5, 0.75),
        published=("93.79(0.06)", "93.51(0.07)", "92.26(0.17)", "86.75(0.31)", "83.03(0.07)"),
    ),
    Arm(
        start="L1+OrthP",
        lr=0.01,
        epochs=120,
        milestones=(0.5, 0.75),
        published=("93.69(0.02)", "93.36(0.19)", "91.96(0.06)", "86.01(0.34)", "82.62(0.05)"),
    ),
    Arm(
        start="L1",
        lr=0.001,
        epochs=120,
        milestones=(2 / 3,),
        published=("93.43(0.06)", "93.12(0.10)", "91.77(0.11)", "87.57(0.09)", "83.10(0.12)"),
    ),
    Arm(start="L1+OrthP", lr=0.001, epochs=120, milestones=(2 / 3,)),
    Arm(
        start="TPP",
        lr=0.01,
        epochs=120,
        milestones=(0.5, 0.75),
        published=("93.81(0.11)", "93.46(0.06)", "92.35(0.12)", "89.63(0.10)", "85.86(0.08)"),
    ),
    Arm(
        start="TPP",
        lr=0.001,
        epochs=120,
        milestones=(2 / 3,),
        published=("93.54(0.08)", "93.32(0.11)", "92.00(0.08)", "89.09(0.10)", "85.47(0.22)"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One cell of the table, one seed."""

    arm: Arm
    ratio: float
    seed: int

    @property
    def key(self) -> str:
        return f"{NET}/PR={self.ratio:g}/{self.arm.start}/lr={self.arm.lr:g}/epochs={self.arm.epochs}/seed={self.seed}"


def all_runs() -> list[Run]:
    """Seed 0 of every arm first, scratch last within a seed (it is the longest); ratios from the middle outwards."""
    arms = sorted(ARMS, key=lambda arm: arm.start == "Scratch")
    return [
        Run(arm=arm, ratio=ratio, seed=seed)
        for seed in range(SEEDS)
        for arm in arms
        for ratio in sorted(RATIOS, key=lambda ratio: abs(ratio - 0.7))
    ]


# ---------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all runs share."""

    train: Split
    test: Split
    weights: Path
    work: Path
    epochs: int | None = None  # instead of each arm's own, for a trial
    tpp: Path | None = None

    def phase_folder(self, run: Run) -> Path | None:
        """Where the weights of a TPP run are, or None where the phase has not been run."""
        folder = self.tpp / f"{run.ratio:g}-{run.seed}" if self.tpp else None
        return folder if folder is not None and RunFolder(path=folder).finished else None

    def can_start(self, run: Run) -> bool:
        return run.arm.start != "TPP" or self.phase_folder(run) is not None

    def start(self, run: Run) -> nn.Module:
        """The weights that a run begins with."""
        if run.arm.start == "TPP":
            folder = self.phase_folder(run)
            assert folder is not None
            return load_exported(folder)[0]
        model = pruned(NET, self.weights, run.ratio, select=("layer*.*.conv1",))
        if run.arm.start == "Scratch":
            return fresh(model, run.seed)
        if run.arm.start == "L1+OrthP":
            orthogonalize_(model, "qr")
        return model

    def begin(self, run: Run) -> tuple[Run, Resident, dict[str, Any]]:
        """The run in training, at its last save where there is one, and what was measured before it began."""
        course = Course(
            settings=SGD.updated(schedule=StepSchedule(milestones=run.arm.milestones)),
            lr=run.arm.lr,
            epochs=self.epochs or run.arm.epochs,
            batch_size=BATCH,
            seed=run.seed,
        )
        spec = input_spec(load_model(NET, pretrained=False).ref)
        resident = Resident(self.start(run), course, self.train, self.test, spec)
        notes = resident.resume(self.saved(run))
        if notes is None:
            params = sum(tensor.numel() for tensor in resident.model.parameters())
            notes = {"params": params, "jsv_start": self.mean_jsv(resident.model), "seconds": 0.0}
            if (folder := self.phase_folder(run)) and run.arm.start == "TPP":
                notes["epochs_before_the_cut"] = sum(phase.epochs for phase in RunFolder(path=folder).report().phases)
        resident.capture()
        return run, resident, notes

    def saved(self, run: Run) -> Path:
        return self.work / f"{run.key.replace('/', '_')}.safetensors"

    def mean_jsv(self, model: nn.Module) -> float:
        found = jacobian_spectrum(copy.deepcopy(model), self.train.images[:JSV_IMAGES]).summary.mean
        return float(f"{found:.4g}")

    def record(self, resident: Resident, notes: Mapping[str, Any]) -> dict[str, Any]:
        """The figures of a finished run. Raises SystemExit where it diverged: no such figure is ever kept."""
        resident.wait()
        if not all(bool(tensor.isfinite().all()) for tensor in resident.model.parameters()):
            raise SystemExit(f"a run diverged: {notes}")
        curve = [round(value, 2) for value in resident.top1()]
        shown = {epoch for epoch in (1, 2, 5, *range(10, len(curve) + 1, 10)) if epoch <= len(curve)}
        return {
            **notes,
            "best": max(curve),
            "best_epoch": 1 + curve.index(max(curve)),
            "last": curve[-1],
            "jsv_last": self.mean_jsv(resident.model),
            "top1": {str(epoch): curve[epoch - 1] for epoch in sorted(shown)},
        }


def fill(bench: Bench, ledger: Ledger, pending: Sequence[Run], *, together: int, seconds: float) -> None:
    """Train the pending runs, ``together`` at a time, until all are in the ledger or the time is up."""
    began = time.monotonic()
    waiting: Iterator[Run] = iter(pending)
    active = [bench.begin(run) for _, run in zip(range(together), waiting, strict=False)]
    while active:
        since = time.monotonic()
        for _ in range(active[0][1].steps_per_epoch):
            for _, resident, _ in active:
                resident.step_()
        over = time.monotonic() - began > seconds
        share = (time.monotonic() - since) / len(active)
        for entry in list(active):
            run, resident, notes = entry
            notes["seconds"] = round(notes["seconds"] + share, 2)
            if resident.done:
                ledger.add({run.key: bench.record(resident, notes)}, device=resident.device)
                bench.saved(run).unlink(missing_ok=True)
                active.remove(entry)
                print(f"{time.monotonic() - began:.0f} s: {run.key} done", flush=True)
                if not over and (after := next(waiting, None)) is not None:
                    active.append(bench.begin(after))
            elif over or resident.epoch % SAVE_EVERY == 0:
                resident.save(bench.saved(run), notes)
        if over:
            print(f"time is up: {len(active)} runs saved, {len(ledger.records)} in the results")
            return


# ---------------------------------------------------------------------------------------------- table


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Best accuracy, mean(std) over the seeds there are, beside the published row and the distance to each base."""
    lines = [row(["best of the epochs", *(f"PR {ratio:g}" for ratio in RATIOS)]), "|---" * (len(RATIOS) + 1) + "|"]
    for arm in ARMS:
        cells, gaps = [], []
        for ratio in RATIOS:
            runs = [records.get(Run(arm=arm, ratio=ratio, seed=seed).key) for seed in range(SEEDS)]
            best = [run["best"] for run in runs if run]
            cells.append(f"{spread(best)}, n={len(best)}" if best else "not run")
            gaps.append(f"{sum(best) / len(best) - BASE:+.2f}" if best else "")
        lines.append(row([arm.name, *cells]))
        if any(gaps):
            lines.append(row(["to our base, 93.39", *gaps]))
        if arm.published:
            lines.append(row(["published", *arm.published]))
            lines.append(row(["to its base, 93.78", *(f"{float(v[:5]) - 93.78:+.2f}" for v in arm.published)]))
    return "\n".join(lines)


def cifar10(folder: str, device: torch.device, limit: int | None) -> tuple[Split, Split]:
    """Training and test images on the device, normalised, in the data set's order."""
    settings = DataSettings(
        name="torch/cifar10", dir=folder, batch_size=1000, augment="none", train_limit=limit, val_limit=limit
    )
    spec = input_spec(load_model(NET, pretrained=False).ref)
    images = open_data(settings, spec, num_classes=10, seed=0)
    shuffled, place = stacked(images.train_loader(epoch=0)), epoch_order(images.train_size, seed=0, epoch=0).argsort()
    train = Split(images=shuffled.images[place], labels=shuffled.labels[place])
    return train.to(device), stacked(images.val_loader()).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with torchvision's CIFAR-10 (cifar-10-batches-py/)")
    parser.add_argument("--weights", type=Path, help="the trained base, cifar10_resnet56.safetensors")
    parser.add_argument("--tpp", type=Path, help="folder of the runs that TPP rows start from")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--together", type=int, default=6, help="networks side by side")
    parser.add_argument("--minutes", type=float, default=28.0, help="then save what is under way and stop")
    parser.add_argument("--only", default="*", help="pattern of the runs to take, as --list names them")
    parser.add_argument("--work", type=Path, default=Path("resnet56_work"), help="saved positions")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--epochs", type=int, help="a trial: fewer epochs; needs --results elsewhere")
    parser.add_argument("--limit", type=int, help="a trial: so many images; needs --results elsewhere")
    parser.add_argument("--list", action="store_true", help="only name the runs and what is done")
    parser.add_argument("--table", action="store_true", help="only print the table")
    asked = parser.parse_args()
    ledger = Ledger(asked.results)
    known = ledger.records
    pending = [run for run in all_runs() if run.key not in known and fnmatch.fnmatch(run.key, asked.only)]
    if asked.list:
        print("\n".join(f"{'done' if run.key in known else 'open'}  {run.key}" for run in all_runs()))
        return
    if not asked.table:
        if not (asked.data_dir and asked.weights):
            parser.error("--data-dir and --weights are needed")
        if (asked.epochs or asked.limit) and asked.results == RESULTS:
            parser.error("a trial's figures do not belong into the table: give --results")
        torch.backends.cudnn.benchmark = True
        train, test = cifar10(asked.data_dir, torch.device(asked.device), asked.limit)
        bench = Bench(
            train=train, test=test, weights=asked.weights, work=asked.work, epochs=asked.epochs, tpp=asked.tpp
        )
        possible = [run for run in pending if bench.can_start(run)]
        fill(bench, ledger, possible, together=asked.together, seconds=60 * asked.minutes)
    print(table(ledger.records))


if __name__ == "__main__":
    main()
