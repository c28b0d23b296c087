"""What the accuracy of a cut is measured on: trained nets with their images, and arms, which are changes of a recipe.

The nets on CIFAR-10 are those of ``cifar_nets.py``, judged on 4,000 test images. The ImageNet nets are judged on every
second class of ``imagenet1k_samples`` (an image a class; training images of these nets, so they show damage, not
generalisation) and calibrated from the other classes; ``imagenette/val``, 500 images of ten classes among the thousand,
are *unseen*: neither the net nor the calibration had them.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared.cifar_nets import CIFAR, CIFAR_IMAGES, recipe_for, trained_base
from prunecli.files import read_tensors, write_tensors
from prunecli.recipe.layers import layered, parse_assignments
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.settings import DataSettings

IMAGENET = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")
NETS = (
    *("cifar_resnet20", "cifar_resnet56", "test_convnext", "test_vit", "tf_efficientnet_lite0"),
    *("test_efficientnet", "densenet121", "regnetx_002", "swin_tiny_patch4_window7_224"),
    *("vgg11_bn", "tf_efficientnet_lite1", "tf_efficientnet_lite2"),
)
TARGETS = ("macs=75%", "macs=50%", "macs=25%", "params=50%")
PADDED_STREAMS = ("conv1", "layer*.conv2")  # shortcuts without weights pad with zeros, which it does not follow
PHOTOGRAPHS_AT_ONCE = 32  # a batch of 128 at 224 pixels takes gigabytes
BEFORE = "before"
ARMS: Mapping[str, tuple[str, ...]] = {
    # what `compress` did before data chose channels and widths
    BEFORE: ("prune.criterion=l1", "prune.ranking=local", "recover.steps=[lstsq,bn]"),
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained net with its images.

    Attributes:
        recipe: recipe that loads them; it has no target.
        unseen: further test images that nothing else looks at.
        whole: name patterns of layers that Torch-Pruning has to leave alone for its cut to run.
    """

    recipe: Recipe
    unseen: DataSettings | None = None
    whole: tuple[str, ...] = ()


def subject(net: str, asked: argparse.Namespace) -> Subject:
    """The net of this name, trained first where it is to be and was not yet.

    Args:
        net: name among ``NETS``.
        asked: options of ``add_sources``.
    """
    if net in CIFAR:
        recipe = recipe_for(net, trained_base(net, asked), CIFAR_IMAGES, asked)
        return Subject(recipe=recipe, whole=PADDED_STREAMS if net.startswith("cifar_resnet") else ())
    samples, unseen = asked.photographs / "imagenet1k_samples" / "val", asked.photographs / "imagenette" / "val"
    classes = sorted(folder.name for folder in samples.iterdir())
    halves, few = asked.work / "imagenet_halves", asked.work / "imagenette"
    link_(samples, halves / "val", classes, classes[0::2])
    link_(samples, halves / "train", classes, classes[1::2])
    link_(unseen, few / "val", classes, [folder.name for folder in unseen.iterdir()])
    recipe = Recipe.from_mapping(
        {
            "model": net,
            "weights": str(Path(asked.checkpoints) / f"{net}.safetensors"),
            "data": {"name": str(halves), "batch_size": PHOTOGRAPHS_AT_ONCE},
            "device": asked.device,
        }
    )
    return Subject(recipe=recipe, unseen=DataSettings(name=str(few), batch_size=PHOTOGRAPHS_AT_ONCE))


def ten_classes(net: str, asked: argparse.Namespace) -> Subject:
    """An ImageNet net with those rows of its classifier that ``imagenette`` has, on that data.

    Args:
        net: name among ``IMAGENET``.
        asked: options of ``add_sources``.
    """
    file = asked.work / f"{net}_imagenette.safetensors"
    images = asked.photographs / "imagenette"
    if not file.is_file():
        every = sorted(folder.name for folder in (asked.photographs / "imagenet1k_samples" / "val").iterdir())
        rows = [every.index(folder.name) for folder in sorted((images / "val").iterdir())]
        tensors = read_tensors(Path(asked.checkpoints) / f"{net}.safetensors")
        head = {name: tensor[rows] for name, tensor in tensors.items() if name.startswith("classifier.")}
        write_tensors(file, tensors | head)
    recipe = Recipe.from_mapping(
        {
            "model": net,
            "model_args": {"num_classes": 10},
            "weights": str(file),
            "data": {"name": str(images), "batch_size": PHOTOGRAPHS_AT_ONCE},
            "device": asked.device,
        }
    )
    return Subject(recipe=recipe)


def link_(source: Path, target: Path, classes: Sequence[str], chosen: Sequence[str]) -> None:
    """Make a folder with all classes, so that labels are those of the net, and the images of some of them as links."""
    for name in classes:
        (target / name).mkdir(parents=True, exist_ok=True)
    for name in chosen:
        for image in (source / name).iterdir():
            link = target / name / image.name
            if not link.is_symlink():
                link.symlink_to(image.resolve())


def recipe_of(plain: Recipe, target: str, seed: int, changes: Sequence[str], own: Mapping[str, Any]) -> Recipe:
    """The job of an arm.

    Args:
        plain: recipe that loads net and images.
        target: cost that is to be left.
        seed: seed of the job, which draws the calibration images too.
        changes: ``KEY=VALUE`` pairs of the arm.
        own: keys that the script sets; the arm's go before them.
    """
    fixed = {"target": target, "seed": seed, "spectrum": {"samples": 0}}
    return Recipe.from_mapping(layered(plain.to_mapping(), fixed, own, parse_assignments(changes)))


# ---------------------------------------------------------------------------------------------- options


def add_sources(parser: argparse.ArgumentParser, *, arms: Sequence[str], results: Path) -> None:
    """Where nets and images lie, which of them are taken, and where the figures go.

    Args:
        parser: parser that gets the options.
        arms: names of the arms that a script knows.
        results: file of the figures, unless another one is named.
    """
    parser.add_argument("--arms", nargs="+", choices=arms, default=())
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--data-dir", help="folder with torchvision's CIFAR-10")
    parser.add_argument("--checkpoints", help="folder with cifar10_resnet20.safetensors, tf_efficientnet_lite0 …")
    parser.add_argument("--photographs", type=Path, help="folder with imagenet1k_samples/val and imagenette/val")
    parser.add_argument(
        "--work", type=Path, default=Path("benchmark_nets"), help="nets that are trained here, and links"
    )
    parser.add_argument("--train-nets", type=Path, metavar="DIR", help="only train the nets that --work DIR lacks")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS, metavar="NET")
    parser.add_argument("--targets", nargs="+", default=TARGETS, metavar="METRIC=SHARE%")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--arm",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "CHANGES"),
        help='repeatable: a name and the changes of the recipe, such as new "prune.criterion=l2 prune.round_to=1"',
    )


def silence_() -> None:
    """Leave out warnings, and the tracebacks that the tracer logs of cuts which do not run."""
    warnings.simplefilter("ignore")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


def own_arms(asked: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """The arms of ``--arm``: changes by name."""
    return {name: tuple(changes.split()) for name, changes in asked.arm}


def train_missing(asked: argparse.Namespace) -> None:
    """Train the nets among those asked for that the folder of ``--train-nets`` lacks."""
    asked.work = asked.train_nets
    for net in asked.nets:
        if net in CIFAR:
            trained_base(net, asked)
