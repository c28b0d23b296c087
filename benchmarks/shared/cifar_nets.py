"""Nets on CIFAR-10 that the benchmarks cut: published checkpoints, and small ones that are trained here, briefly.

``trained_base`` trains a net once, into a folder of the caller; whichever script comes first has to wait for it. Random
weights, order and augmentation are those of seed 0.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunecli.files import write_tensors
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.schedules import CosineSchedule
from prunecli.recipe.settings import FinetuneSettings
from prunecli.run.job import Job, open_job
from prunecli.training import finetune
from prunecli.training.loop import TrainingRun
from prunecli.values.learning_rate import OptimizerName

CIFAR_IMAGES, CIFAR_TEST = 5_000, 4_000  # of a fine-tuning and of its judgement
SETTINGS = {
    "sgd": FinetuneSettings(optimizer="sgd", momentum=0.9, weight_decay=1e-4, decay_norms=True),
    "adamw": FinetuneSettings(optimizer="adamw", weight_decay=0.05),
}


@dataclass(frozen=True, kw_only=True)
class Base:
    """How the base of a net without a checkpoint is trained: from random weights, by cosine."""

    epochs: int
    images: int
    warmup: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CifarNet:
    """A net on CIFAR-10: what trains it, where its base comes from, and which layers ``lr_regret.py`` cuts."""

    select: str = "*"
    optimizer: OptimizerName = "sgd"
    peak: float = 0.1
    args: Mapping[str, Any] = field(default_factory=dict)
    base: Base | None = None


CIFAR = {
    "cifar_resnet20": CifarNet(select="layer*.*.conv1"),
    "cifar_resnet56": CifarNet(select="layer*.*.conv1"),
    "vgg11_bn": CifarNet(
        select="features.*", args={"mlp_ratio": 0.0625}, peak=0.01, base=Base(epochs=4, images=20_000)
    ),
    "test_convnext": CifarNet(
        select="stages.*.mlp.fc1",
        optimizer="adamw",
        peak=0.002,
        args={"patch_size": 2},
        base=Base(epochs=20, images=50_000, warmup=1),
    ),
    "test_vit": CifarNet(
        select="blocks.*.mlp.fc1",
        optimizer="adamw",
        peak=0.001,
        args={"patch_size": 4},
        base=Base(epochs=8, images=50_000, warmup=1),
    ),
    # squeeze-and-excitation on depthwise convolutions; dense blocks; grouped convolutions; windows
    "test_efficientnet": CifarNet(args={"output_stride": 8}, base=Base(epochs=5, images=50_000)),
    "densenet121": CifarNet(args={"growth_rate": 16, "block_config": [4, 4, 4]}, base=Base(epochs=4, images=50_000)),
    "regnetx_002": CifarNet(
        args={"depth": 8, "w0": 24, "wa": 24.0, "wm": 2.2, "group_size": 8, "output_stride": 16},
        base=Base(epochs=5, images=50_000),
    ),
    "swin_tiny_patch4_window7_224": CifarNet(
        optimizer="adamw",
        peak=0.001,
        args={"window_size": 4, "embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6]},
        base=Base(epochs=5, images=50_000, warmup=1),
    ),
}


def recipe_for(net: str, weights: Path | None, images: int, asked: argparse.Namespace) -> Recipe:
    """A job on CIFAR-10 with this net: from random weights where it has no others."""
    data = {"name": "torch/cifar10", "dir": asked.data_dir, "train_limit": images, "val_limit": CIFAR_TEST}
    if CIFAR[net].base is not None:
        data["input_size"] = (3, 32, 32)
    return Recipe.from_mapping(
        {
            "model": net,
            "model_args": {**CIFAR[net].args, "num_classes": 10},
            "weights": weights and str(weights),
            "pretrained": weights is not None,
            "data": data,
            "device": asked.device,
        }
    )


def trained_base(net: str, asked: argparse.Namespace) -> Path:
    """The file of the net's weights, trained first where it is to be and was not yet."""
    how = CIFAR[net]
    if how.base is None:
        return Path(asked.checkpoints) / f"{net.replace('cifar_', 'cifar10_')}.safetensors"
    file: Path = asked.work / f"{net}_cifar10_base.safetensors"
    if file.is_file():
        return file
    with opened(recipe_for(net, None, how.base.images, asked)) as job:
        assert job.images is not None
        settings = SETTINGS[how.optimizer].updated(
            schedule=CosineSchedule(min_lr=how.peak / 100, warmup_epochs=how.base.warmup)
        )
        done = finetune.finetune(
            job.source.model,
            job.images,
            settings,
            lr=how.peak,
            epochs=how.base.epochs,
            run=TrainingRun(device=job.device, seed=0, folder=asked.work / f"{net}_cifar10_base"),
        )
        print(net, "base", done.last_top1, flush=True)
        write_tensors(file, job.source.model.state_dict())
    return file


@contextmanager
def opened(recipe: Recipe) -> Iterator[Job]:
    """The tool's own job, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as scratch:
        yield open_job("compress", recipe, out=Path(scratch) / "run", resume=False, force=False, notify=lambda _: None)
