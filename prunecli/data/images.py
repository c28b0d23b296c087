"""Batches for training, evaluation and calibration, the same bits for the same seed and epoch.

Preprocessing is the checkpoint's own (``zoo.InputSpec``). Batches are pairs: images ``[B, C, H, W]`` float32,
normalised, and labels ``[B]`` int64.

What makes a run repeatable: the order of an epoch is a function of (seed, epoch), and the random part of a sample's
augmentation a function of (seed, epoch, position in the split). So batch ``k`` is the same whether the epoch started at
batch 0 or at ``k``, and whatever number of worker processes prepares it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunecli.data.sources import UNREADABLE, ArraySplit, Split, open_source
from prunecli.errors import PruneError, UsageError
from prunecli.models.build import InputSpec
from prunecli.recipe.settings import DataSettings

log = logging.getLogger("prunecli")

WRITTEN_CHARACTERS = frozenset({"digits", "torch/mnist", "torch/kmnist", "torch/qmnist"})
PAD = 4

# One value each for the kinds of random numbers, so that none repeats another's.
ORDER, CROPS, AUGMENT, CALIBRATION, SUBSET, VIEW, PARTNER = range(7)

Batch = tuple[Tensor, Tensor]
Companion = Literal["none", "class", "view"]


def open_data(settings: DataSettings, spec: InputSpec, *, num_classes: int, seed: int) -> Images:
    """Find the images that ``settings`` name and check that they fit the model.

    ``name`` is a folder (``train/`` and ``validation/``, ``val/``, ``valid/`` or ``test/``, each with a folder a class;
    or the class folders themselves, then for evaluation only), a timm dataset name (``torch/cifar10`` below
    ``settings.dir``, ``wds/…`` for local tar shards there, ``hfds/…``), or ``digits`` (scikit-learn's; of each class
    every fifth image is validation).
    ``train_limit`` and ``val_limit`` choose images as ``limited`` says. ``augment: auto`` is ``crop_flip`` for inputs
    up to 64 pixels and ``timm`` above, but ``none`` for written characters, which a flip would turn into others.

    Raises:
        UsageError: the folder or dataset name does not exist.
        PruneError: no images, one class only, other classes than the model has, a dataset that is not on disk.
    """
    if spec.size[0] not in (1, 3):
        raise UsageError(f"Images have 1 or 3 channels; a model with {spec.size[0]} cannot be fed with them.")
    source = open_source(settings, mode=_mode(spec))
    names = source.class_names
    if len(names) < 2:
        raise PruneError(f"Data {settings.name} has only {len(names)} class ({', '.join(names)}).")
    if len(names) != num_classes:
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise PruneError(
            f"Data {settings.name} has {len(names)} classes ({shown}), the model has {num_classes}.",
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
    """``limit`` images of a split, in the split's order: those that come first in one fixed shuffling of it.

    Folders are sorted by class, so the first images as they lie there would be one class. The shuffling depends on the
    length alone, not on the run's seed: runs with different seeds are evaluated on the same images, and a larger limit
    contains the images of a smaller one.
    """
    if limit is None or limit >= len(split):
        return split
    chosen = torch.randperm(len(split), generator=_generator(SUBSET))[:limit]
    return split.subset(sorted(chosen.tolist()))


# ---------------------------------------------------------------------------------------------- transforms


class EvalTransform:
    """The checkpoint's own preprocessing: timm's resize, centre crop and normalisation. Image → ``[C, H, W]``."""

    def __init__(self, spec: InputSpec) -> None:
        self.spec = spec
        self.transform: Callable[[Image.Image], Tensor] = create_transform(
            input_size=spec.size,
            is_training=False,
            interpolation=spec.interpolation,
            mean=spec.mean,
            std=spec.std,
            crop_pct=spec.crop_pct,
            crop_mode=spec.crop_mode,
        )

    def __call__(self, image: Image.Image, position: int) -> Tensor:
        return self.transform(image)

    def only_normalises(self, split: Split) -> bool:
        """Whether resizing and cropping change nothing: then a whole batch of pixels can be normalised at once."""
        if not isinstance(split, ArraySplit) or split.pixels.shape[1:3] != self.spec.size[1:]:
            return False
        return self.spec.crop_pct == 1 and split.pixels.ndim - 2 <= self.spec.size[0]  # colour to grey is Pillow's

    def normalised(self, pixels: Tensor) -> Tensor:
        """Uint8 ``[B, H, W]`` or ``[B, H, W, 3]`` → ``[B, C, H, W]``, bit-equal to the transform image by image."""
        channels = self.spec.size[0]
        planes = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels.unsqueeze(1).expand(-1, channels, -1, -1)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.spec.mean, self.spec.std))
        return planes.contiguous().float().div_(255).sub_(mean).div_(std)


class TimmAugment:
    """timm's training transform (random resized crop, flip, colour jitter) with this sample's own random numbers."""

    def __init__(self, spec: InputSpec, *, seed: int, epoch: int) -> None:
        self.transform: Callable[[Image.Image], Tensor] = create_transform(
            input_size=spec.size, is_training=True, interpolation=spec.interpolation, mean=spec.mean, std=spec.std
        )
        self.seed = seed
        self.epoch = epoch

    def __call__(self, image: Image.Image, position: int) -> Tensor:
        with _own_random_numbers(AUGMENT, self.seed, self.epoch, position):
            return self.transform(image)


class CropFlip:
    """Pad 4 black pixels, crop at random to the old size, flip half of the images (He et al. 2016, section 4.2).

    Works on normalised images ``[B, C, H, W]``; black is then ``-mean / std``, so the result equals cropping the pixels
    first.
    """

    def __init__(self, spec: InputSpec, *, count: int, seed: int, epoch: int) -> None:
        rng = np.random.default_rng((CROPS, seed, epoch))
        self.corners = torch.from_numpy(rng.integers(0, 2 * PAD + 1, size=(count, 2)))
        self.flips = torch.from_numpy(rng.integers(0, 2, size=count)).bool()
        size = (1, *spec.size[1:])
        self.black = EvalTransform(spec).normalised(torch.zeros(size, dtype=torch.uint8))[:, :, :1, :1]

    def __call__(self, x: Tensor, positions: Sequence[int] | Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        padded = self.black.to(x).expand(batch, channels, height + 2 * PAD, width + 2 * PAD).clone()
        padded[:, :, PAD:-PAD, PAD:-PAD] = x
        at = torch.as_tensor(positions)
        corners, flips = self.corners[at].to(x.device), self.flips[at, None].to(x.device)
        columns = torch.arange(width, device=x.device).expand(batch, width)
        columns = torch.where(flips, columns.flip(1), columns) + corners[:, 1:]
        rows = torch.arange(height, device=x.device) + corners[:, :1]
        each = torch.arange(batch, device=x.device)[:, None, None]
        chosen = padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]
        return chosen.permute(0, 3, 1, 2).contiguous()


@contextlib.contextmanager
def _own_random_numbers(*key: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's global generators from ``key``, and puts them back afterwards.

    timm and torchvision draw from all three.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - the global one is meant
    state = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))  # noqa: NPY002
    torch.manual_seed(int(state[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


# ---------------------------------------------------------------------------------------------- batches


class Watched:
    """A split and which of its images could not be decoded: one byte an image, in memory that workers share."""

    def __init__(self, split: Split, *, limit: int) -> None:
        self.split = split
        self.limit = limit
        flags = torch.zeros(len(split), dtype=torch.uint8)
        self.bad: Tensor = flags.share_memory_()  # type: ignore[no-untyped-call]

    def load(self, position: int) -> tuple[Image.Image, int] | None:
        """The image and its class, or None and a mark where it cannot be decoded."""
        try:
            return self.split.load(position)
        except UNREADABLE as error:
            if not self.bad[position]:
                self.bad[position] = 1
                log.warning("Image %s cannot be read: %s", self.split.name(position), error)
            return None

    def load_next(self, position: int) -> tuple[Image.Image, int] | None:
        """The same, but the next readable image instead of None; gives up past ``limit``, where the run stops."""
        turn = itertools.chain(range(position, len(self.split)), range(position))
        found = (self.load(at) for at in itertools.islice(turn, self.limit + 1))
        return next((image for image in found if image is not None), None)

    @property
    def bad_names(self) -> tuple[str, ...]:
        return tuple(self.split.name(int(i)) for i in self.bad.nonzero())


@dataclass(frozen=True, kw_only=True)
class Samples(Dataset[Batch]):
    """Positions of a split → a batch. Unreadable images are replaced by the next readable one, or left out."""

    watched: Watched
    transform: EvalTransform | TimmAugment
    vary: CropFlip | None = None
    replace: bool
    size: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.watched.split)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        split = self.watched.split
        if isinstance(self.transform, EvalTransform) and self.transform.only_normalises(split):
            assert isinstance(split, ArraySplit)
            at = np.asarray(positions)
            images = self.transform.normalised(torch.from_numpy(split.pixels[at]))
            return self._varied(images, positions), torch.from_numpy(split.labels[at])
        load = self.watched.load_next if self.replace else self.watched.load
        loaded = [(at, found) for at in positions if (found := load(at)) is not None]
        if not loaded:
            return torch.empty(0, *self.size), torch.empty(0, dtype=torch.int64)
        images = torch.stack([self.transform(image, at) for at, (image, _) in loaded])
        labels = torch.tensor([label for _, (_, label) in loaded], dtype=torch.int64)
        return self._varied(images, [at for at, _ in loaded]), labels

    def _varied(self, images: Tensor, positions: Sequence[int]) -> Tensor:
        return images if self.vary is None else self.vary(images, positions)


@dataclass(frozen=True, kw_only=True)
class Companions(Dataset[Batch]):
    """Positions of a split → ``[2B]``: each image, augmented, and then its companion, augmented by its own numbers.

    ``partners``: for each position that of its companion.
    """

    samples: Samples
    others: Samples
    partners: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        first, labels = self.samples.__getitems__(positions)
        second, classes = self.others.__getitems__(self.partners[list(positions)].tolist())
        if len(labels) != len(classes):  # more images are unreadable than may be, which the loader will say
            return first[:0], labels[:0]
        return torch.stack([first, second], dim=1).flatten(0, 1), torch.stack([labels, classes], dim=1).flatten()


def _as_it_is(batch: Any) -> Any:
    """``Samples`` makes whole batches, so there is nothing to collate."""
    return batch


class Loader(DataLoader[Batch]):
    """A DataLoader that calls ``check`` after each batch and passes on no empty ones."""

    def __init__(self, dataset: Samples | Companions, *, check: Callable[[], None], **kwargs: Any) -> None:
        # without its own generator each pass would draw a seed from the global one, and so change the run
        super().__init__(
            dataset,
            collate_fn=_as_it_is,
            generator=_generator(0),
            pin_memory=torch.cuda.is_available(),
            **kwargs,
        )
        self.check = check

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for images, labels in super().__iter__():
            self.check()
            if len(labels):
                yield images, labels


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
        self._augment = _augmentation(settings, spec)

    @property
    def num_classes(self) -> int:
        """How many classes the data, and so the model, has."""
        return len(self.class_names)

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Names of the images that could not be decoded so far, training images first."""
        return tuple(name for watched in self._watched for name in watched.bad_names)

    @property
    def train_size(self) -> int:
        """Training images; 0 where the source is for evaluation only."""
        return 0 if self._train is None else len(self._train.split)

    @property
    def val_size(self) -> int:
        """Validation images."""
        return len(self._val.split)

    @property
    def steps_per_epoch(self) -> int:
        """Training batches in one epoch; 0 where the source is for evaluation only."""
        return math.ceil(self.train_size / self._settings.batch_size) - self._drops_last

    def train_loader(self, *, epoch: int, skip_batches: int = 0, companion: Companion = "none") -> DataLoader[Any]:
        """The batches of one epoch from ``skip_batches`` on. A last batch of one image is left out.

        An unreadable image is replaced by the next readable one. With companions a batch is twice as long: behind each
        image another one of its class (``class``; itself, where there is no other) or another view of it (``view``).

        Raises:
            UsageError: the source has no training images, or does not say of what class they are.
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

    def calibration(self, count: int) -> Batch:
        """``count`` training images (all, if fewer) chosen by the seed, in evaluation preprocessing, with their labels.

        A source that is for evaluation only gives validation images.

        Raises:
            PruneError: more images are unreadable than ``unreadable_limit``.
        """
        watched = self._train or self._val
        order = torch.randperm(len(watched.split), generator=_generator(CALIBRATION, self._seed)).tolist()
        samples = self._plain_samples(watched)
        images, labels = samples.__getitems__(order[:count])
        for at in order[count:]:  # only where some were unreadable
            if len(labels) == min(count, len(order)):
                break
            more = samples.__getitems__([at])
            images, labels = torch.cat([images, more[0]]), torch.cat([labels, more[1]])
        self._check_unreadable()
        return images, labels

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
        """Raises PruneError above the limit."""
        count = sum(int(watched.bad.count_nonzero()) for watched in self._watched)
        if count > self._settings.unreadable_limit:
            names = self.unreadable
            shown = ", ".join(names[:5]) + (", …" if count > 5 else "")
            raise PruneError(
                f"{count} images of {self._settings.name} cannot be read ({shown}), "
                f"more than unreadable_limit={self._settings.unreadable_limit}.",
                hint="Repair or remove them, or raise data.unreadable_limit.",
            )


# ---------------------------------------------------------------------------------------------- small values


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """The order ``[count]`` in which an epoch goes through the training images: a function of (seed, epoch)."""
    return torch.randperm(count, generator=_generator(ORDER, seed, epoch))


def partners_of_class(classes: NDArray[np.int64], *, seed: int, epoch: int) -> Tensor:
    """For each of the images ``[count]`` another one of its class, uniformly; itself, where it is the only one.

    A function of (seed, epoch).
    """
    draw = np.random.default_rng((PARTNER, seed, epoch))
    partners = np.arange(len(classes))
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        if (count := len(members)) > 1:
            partners[members] = members[(np.arange(count) + draw.integers(1, count, size=count)) % count]
    return torch.from_numpy(partners)


def _augmentation(settings: DataSettings, spec: InputSpec) -> str:
    if settings.augment != "auto":
        return settings.augment
    if settings.name in WRITTEN_CHARACTERS:
        return "none"
    return "crop_flip" if max(spec.size[1:]) <= 64 else "timm"


def _mode(spec: InputSpec) -> str:
    """Pillow's mode for the model's channels."""
    return "L" if spec.size[0] == 1 else "RGB"


def _generator(*key: int) -> torch.Generator:
    """A torch generator that is a function of ``key``."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1)
