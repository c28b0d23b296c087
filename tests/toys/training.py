"""A tiny labelled data set and nets to fine-tune; run as a program it trains and is killed on the way."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from prunecli import files
from prunecli.methods.phase import Phase
from prunecli.methods.train_phase import train_phase_
from prunecli.recipe.settings import FinetuneSettings
from prunecli.training import finetune
from prunecli.training.loop import TrainingRun
from prunecli.values.groups import IndexMap, Member
from prunecli.values.plan import PlannedGroup
from prunecli.values.report import FinetuneReport, PhaseReport

torch.set_num_threads(1)
CPU = torch.device("cpu")

SGD = FinetuneSettings(
    optimizer="sgd",
    ema=0.9,
    loss={"kind": "ce", "mixup": 0.4, "label_smoothing": 0.1},
    schedule={"kind": "cosine", "warmup_epochs": 0.5},
    checkpoint_every=4,
    export="best",
)
CSKD = FinetuneSettings(optimizer="sgd", loss={"kind": "cskd", "label_smoothing": 0.1}, checkpoint_every=4)
PSKD = FinetuneSettings(optimizer="sgd", loss="pskd", checkpoint_every=4)
DLB = FinetuneSettings(optimizer="sgd", loss="dlb", channels_last="on", checkpoint_every=4)
ADAMW = FinetuneSettings(optimizer="adamw", schedule="step", clip_grad=1.0, checkpoint_every=5)
RUN: dict[str, Any] = {"lr": 0.05, "epochs": 3, "device": CPU, "seed": 7}


class ToyImages:
    """Six classes of noisy 8x8 patterns; the order of an epoch follows from (seed, epoch) alone."""

    num_classes = 6

    def __init__(self, *, train: int = 96, val: int = 60, batch_size: int = 8, kill_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randn(self.num_classes, 1, 8, 8, generator=generator)
        labels = torch.arange(train + val) % self.num_classes
        images = patterns[labels] + 1.5 * torch.randn(train + val, 1, 8, 8, generator=generator)
        self.train, self.val = (
            TensorDataset(images[:train], labels[:train]),
            TensorDataset(images[train:], labels[train:]),
        )
        self.batch_size, self.kill_at = batch_size, kill_at
        self.steps_per_epoch = train // batch_size
        self.val_loads = 0

    def train_loader(self, *, epoch: int, skip_batches: int = 0, companion: str = "none") -> DataLoader[Any]:
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(epoch))
        order = order[: self.steps_per_epoch * self.batch_size]
        step = -1 if self.kill_at is None else self.kill_at - epoch * self.steps_per_epoch
        fatal = int(order[step * self.batch_size]) if 0 <= step < self.steps_per_epoch else None
        left = order[skip_batches * self.batch_size :].tolist()
        if companion == "none":
            return DataLoader(_Deadly(self.train, fatal), sampler=left, batch_size=self.batch_size)
        shift = self.num_classes if companion == "class" else 0  # labels go round
        pairs = [at for first in left for at in (first, (first + shift) % len(self.train))]
        return DataLoader(_Deadly(self.train, fatal), sampler=pairs, batch_size=2 * self.batch_size)

    def val_loader(self) -> DataLoader[Any]:
        self.val_loads += 1
        return DataLoader(self.val, batch_size=32)

    def calibration(self, count: int) -> tuple[Tensor, Tensor]:
        images, labels = self.train.tensors
        return images[:count], labels[:count]


class _Deadly(torch.utils.data.Dataset[Any]):
    """Kills the process, as kill -9 would, when the image ``fatal`` is read."""

    def __init__(self, data: torch.utils.data.Dataset[Any], fatal: int | None) -> None:
        self.data, self.fatal = data, fatal

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if index == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        item: tuple[Tensor, ...] = self.data[index]
        return item


def toy_net(*, dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(6 * 64, 6),
    )


PHASE = Phase(
    name="push",
    steps=30,
    lr=0.02,
    momentum=0.9,
    reg_step=0.25,
    reg_every=2,
    reg_ceiling=1.0,
    gram_weight=10.0,
    zero_from=26,
    zero_every=2,
)


def toy_groups() -> tuple[PlannedGroup, ...]:
    """Two of the six channels of `toy_net` leave."""
    members = [("0.weight", 0, "out"), ("0.bias", 0, "elementwise")]
    members += [(f"1.{name}", 0, "elementwise") for name in ("weight", "bias", "running_mean", "running_var")]
    made = [Member(tensor=name, dim=dim, role=role) for name, dim, role in members]  # type: ignore[arg-type]
    made.append(Member(tensor="5.weight", dim=1, role="in", index=IndexMap(stride=64, loops=((64, 1),))))
    return (PlannedGroup(name="conv", kind="channels", width=6, keep=(0, 2, 3, 5), members=tuple(made)),)


def tune(
    model: nn.Module,
    images: ToyImages,
    settings: FinetuneSettings,
    *,
    lr: float,
    epochs: int,
    teacher: nn.Module | None = None,
    **run: Any,
) -> FinetuneReport:
    return finetune.finetune(model, images, settings, lr=lr, epochs=epochs, run=TrainingRun(**run), teacher=teacher)


def train_toy_phase(
    model: nn.Module,
    images: ToyImages,
    *,
    groups: tuple[PlannedGroup, ...] = toy_groups(),
    settings: FinetuneSettings = ADAMW,
    teacher: nn.Module | None = None,
    **run: Any,
) -> PhaseReport:
    place = TrainingRun(device=CPU, seed=7, **run)
    return train_phase_(model, PHASE, groups, images, settings, method="tpp", run=place, teacher=teacher)


def _kill_in_write(count: int) -> None:
    """Die inside the ``count``-th write, after the temporary file is filled and before it is renamed."""
    fsync, seen = os.fsync, 0

    def deadly(handle: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 2 * count - 1:  # each write flushes the file, then the folder
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    files.os.fsync = deadly  # type: ignore[assignment]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Interrupting(torch.utils.data.Dataset[Any]):
    """Sends SIGTERM to the process once ``after`` images were read."""

    def __init__(self, data: Any, after: int) -> None:
        self.data, self.left = data, after

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.data[index]


if __name__ == "__main__":
    where, name, moment = sys.argv[1:]
    if moment == "in-write":
        _kill_in_write(4)
    images = ToyImages(kill_at=None if moment == "in-write" else int(moment))
    tune(toy_net(), images, {"sgd": SGD, "adamw": ADAMW}[name], folder=Path(where), **RUN)
