"""Batches of images, in an order that a seed decides."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunecli.data.sources import UNREADABLE, ArraySplit, Split
from prunecli.data.transforms import CropFlip, EvalTransform, TimmAugment, generator

log = logging.getLogger("prunecli")

Batch = tuple[Tensor, Tensor]
Companion = Literal["none", "class", "view"]


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
            generator=generator(0),
            pin_memory=torch.cuda.is_available(),
            **kwargs,
        )
        self.check = check

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for images, labels in super().__iter__():
            self.check()
            if len(labels):
                yield images, labels
