"""Batches for training, evaluation and calibration, the same bits for the same seed and epoch.

Preprocessing is the checkpoint's own (``models.build.InputSpec``). Batches are pairs: images ``[B, C, H, W]`` float32,
normalised, and labels ``[B]`` int64.

What makes a run repeatable: the order of an epoch is a function of (seed, epoch), and the random part of a sample's
augmentation a function of (seed, epoch, position in the split). So batch ``k`` is the same whether the epoch started at
batch 0 or at ``k``, and whatever number of worker processes prepares it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from prunecli.data.calibration import SeededOrder
from prunecli.data.loader import Batch, Companion, Companions, Loader, Samples, Watched, require_readable
from prunecli.data.sources import Split, open_source
from prunecli.data.transforms import (
    ORDER,
    PARTNER,
    SUBSET,
    VIEW,
    CropFlip,
    EvalTransform,
    TimmAugment,
    augmentation,
    generator,
    mode,
)
from prunecli.errors import PruneError, UsageError, listed
from prunecli.models.build import InputSpec
from prunecli.recipe.settings import DataSettings


def open_data(settings: DataSettings, spec: InputSpec, *, num_classes: int, seed: int) -> Images:
    """Find the images that ``settings`` name and check that they fit the model.

    ``name`` is a folder (``train/`` and ``validation/``, ``val/``, ``valid/`` or ``test/``, each with a folder a class;
    or the class folders themselves, then for evaluation only), a timm dataset name (``torch/cifar10`` below
    ``settings.dir``, ``wds/…`` for local tar shards there, ``hfds/…``), or ``digits`` (scikit-learn's; of each class
    every fifth image is validation).
    ``train_limit`` and ``val_limit`` choose images as ``limited`` does. ``augment: auto`` is ``crop_flip`` for inputs
    up to 64 pixels and ``timm`` above, but ``none`` for written characters, which a flip would turn into others.

    Args:
        settings: section ``data`` of the recipe.
        spec: images that the model expects.
        num_classes: number of the model's logits.
        seed: seed of the order, the augmentation and the choice of calibration images.

    Raises:
        UsageError: the folder or dataset name does not exist.
        PruneError: no images, one class only, other classes than the model has, a dataset that is not on disk.
    """
    source = open_source(settings, mode=mode(spec))
    names = source.class_names
    if len(names) < 2:
        raise PruneError(f"Data {settings.name} has only {len(names)} class ({', '.join(names)}).")
    if len(names) != num_classes:
        raise PruneError(
            f"Data {settings.name} has {len(names)} classes ({listed(names, 3)}), the model has {num_classes}.",
            hint=f"Use other data, or --model-arg num_classes={len(names)} for a new classifier.",
        )
    return Images(
        train=None if source.train is None else limited(source.train, settings.train_limit),
        val=limited(source.val, settings.val_limit),
        class_names=names,
        settings=settings,
        spec=spec,
        seed=seed,
    )


def limited(split: Split, limit: int | None) -> Split:
    """A split of ``limit`` images, in the split's order: those that come first in one fixed shuffling of it.

    Folders are sorted by class, so the first images as they lie there would be one class. The shuffling depends on the
    length alone, not on the run's seed: runs with different seeds are evaluated on the same images, and a larger limit
    contains the images of a smaller one.

    Args:
        split: images to choose from.
        limit: number of images; ``None`` or a number that the split does not reach keeps all.
    """
    if limit is None or limit >= len(split):
        return split
    chosen = torch.randperm(len(split), generator=generator(SUBSET))[:limit]
    return split.subset(sorted(chosen.tolist()))


class Images:
    """Labelled images of one source, ready for a model (made by ``open_data``)."""

    def __init__(
        self,
        *,
        train: Split | None,
        val: Split,
        class_names: Sequence[str],
        settings: DataSettings,
        spec: InputSpec,
        seed: int,
    ) -> None:
        self.class_names = tuple(class_names)
        self._train = None if train is None else Watched(train, limit=settings.unreadable_limit)
        self._val = Watched(val, limit=settings.unreadable_limit)
        self._settings = settings
        self._spec = spec
        self._seed = seed
        self._augment = augmentation(settings, spec)
        samples = self._plain_samples(self._train or self._val)
        self._calibration = SeededOrder(samples, seed=seed, title=str(settings.name))

    @property
    def num_classes(self) -> int:
        """Number of classes of the data, and so of the model."""
        return len(self.class_names)

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Names of the images that could not be decoded so far, training images first."""
        return tuple(name for watched in self._watched for name in watched.bad_names)

    @property
    def train_size(self) -> int:
        """Number of training images; 0 where the source is for evaluation only."""
        return 0 if self._train is None else len(self._train.split)

    @property
    def val_size(self) -> int:
        """Number of validation images."""
        return len(self._val.split)

    @property
    def steps_per_epoch(self) -> int:
        """Number of training batches in one epoch; 0 where the source is for evaluation only."""
        return math.ceil(self.train_size / self._settings.batch_size) - self._drops_last

    def train_loader(self, *, epoch: int, skip_batches: int = 0, companion: Companion = "none") -> DataLoader[Any]:
        """The batches of one epoch. A last batch of one image is left out.

        An unreadable image is replaced by the next readable one.

        Args:
            epoch: number of the epoch, which decides order and augmentation.
            skip_batches: number of batches to leave out at the beginning, for a run that is resumed.
            companion: image that follows each image, so that a batch is twice as long: another one of its class
                (``class``; itself, where there is no other) or another view of it (``view``).

        Raises:
            UsageError: the source has no training images, or does not tell their classes before they are read.
            PruneError: (also while iterating) more images are unreadable than ``unreadable_limit``.
        """
        if self._train is None:
            raise UsageError(
                f"Data {self._settings.name} has no training images.",
                hint=f"Put them into {self._settings.name}/train, one folder a class.",
            )
        order = epoch_order(self.train_size, seed=self._seed, epoch=epoch).tolist()
        samples = self._training_samples(self._train, epoch=epoch, seed=self._seed)
        pairs = None if companion == "none" else self._with_companions(self._train, samples, companion, epoch)
        skipped = skip_batches * self._settings.batch_size
        return self._loader(pairs or samples, order[skipped:], drop_last=self._drops_last)

    def val_loader(self) -> DataLoader[Any]:
        """All validation images, in the source's order, in evaluation preprocessing; unreadable ones are left out.

        Raises:
            PruneError: (also while iterating) more images are unreadable than ``unreadable_limit``.
        """
        return self._loader(self._plain_samples(self._val), range(self.val_size), drop_last=False)

    @property
    def size(self) -> int:
        """Number of images that ``calibration`` draws from: the training images, else the validation images."""
        return self.train_size or self.val_size

    @property
    def description(self) -> str:
        """The images that ``calibration`` draws from, in words."""
        return f"the {'training' if self._train else 'validation'} images of {self._settings.name}"

    def calibration(self, count: int, start: int = 0) -> Batch:
        """Training images in an order that the seed decides, in evaluation preprocessing, with their labels.

        A source that is for evaluation only gives validation images.

        Args:
            count: number of images; fewer come where there are no more.
            start: number of readable images to pass over at the head of the order.

        Raises:
            PruneError: more images are unreadable than ``unreadable_limit``.
        """
        batch = self._calibration.batch(count, start)
        self._check_unreadable()
        return batch

    def unlabelled(self, count: int, start: int = 0) -> Tensor:
        """The images ``[N, C, H, W]`` of ``calibration`` without their labels. Raises PruneError as that."""
        return self.calibration(count, start)[0]

    @property
    def _watched(self) -> tuple[Watched, ...]:
        return (self._val,) if self._train is None else (self._train, self._val)

    @property
    def _drops_last(self) -> bool:
        """BatchNorm cannot train on a single image, so a last batch of one is dropped; larger ones are kept."""
        return self._settings.batch_size > 1 and self.train_size % self._settings.batch_size == 1

    def _with_companions(self, watched: Watched, samples: Samples, companion: Companion, epoch: int) -> Companions:
        partners = torch.arange(self.train_size)
        if companion == "class":
            classes = watched.split.classes()
            if classes is None:
                raise UsageError(
                    f"Data {self._settings.name} does not tell the classes of its images before they are read, and "
                    "loss cskd pairs images by class.",
                    hint="Use finetune.loss=pskd or dlb.",
                )
            partners = partners_of_class(classes, seed=self._seed, epoch=epoch)
        other_seed = int(np.random.SeedSequence((VIEW, self._seed)).generate_state(1)[0])
        others = self._training_samples(watched, epoch=epoch, seed=other_seed)
        return Companions(samples=samples, others=others, partners=partners)

    def _training_samples(self, watched: Watched, *, epoch: int, seed: int) -> Samples:
        timm, crop_flip = self._augment == "timm", self._augment == "crop_flip"
        return Samples(
            watched=watched,
            transform=TimmAugment(self._spec, seed=seed, epoch=epoch) if timm else EvalTransform(self._spec),
            vary=CropFlip(self._spec, count=self.train_size, seed=seed, epoch=epoch) if crop_flip else None,
            replace=True,
            size=self._spec.size,
        )

    def _plain_samples(self, watched: Watched) -> Samples:
        return Samples(watched=watched, transform=EvalTransform(self._spec), replace=False, size=self._spec.size)

    def _loader(self, samples: Samples | Companions, order: Sequence[int], *, drop_last: bool) -> Loader:
        self._check_unreadable()
        return Loader(
            samples,
            check=self._check_unreadable,
            sampler=order,
            batch_size=self._settings.batch_size,
            drop_last=drop_last,
            num_workers=self._settings.workers,
        )

    def _check_unreadable(self) -> None:
        """Raise PruneError where more images are unreadable than ``unreadable_limit``."""
        require_readable(self._watched, str(self._settings.name))


# ---------------------------------------------------------------------------------------------- small values


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch goes through the training images.

    Args:
        count: number of training images.
        seed: seed of the run.
        epoch: number of the epoch, which gives each epoch its own order.

    Returns:
        Positions ``[count]``, int64.
    """
    return torch.randperm(count, generator=generator(ORDER, seed, epoch))


def partners_of_class(classes: NDArray[np.int64], *, seed: int, epoch: int) -> Tensor:
    """For each image another one of its class, uniformly; itself, where it is the only one.

    Args:
        classes: class ``[N]`` of every image.
        seed: seed of the draw.
        epoch: number of the epoch, which gives each epoch its own draw.

    Returns:
        Positions ``[N]``, int64.
    """
    draw = np.random.default_rng((PARTNER, seed, epoch))
    partners = np.arange(len(classes))
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        if (count := len(members)) > 1:
            partners[members] = members[(np.arange(count) + draw.integers(1, count, size=count)) % count]
    return torch.from_numpy(partners)
