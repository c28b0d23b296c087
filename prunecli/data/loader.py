"""From positions of a split to batches: reading images, standing in for unreadable ones, pairing, loading in workers.

A batch is a pair: images ``[B, C, H, W]`` float32, normalised, and labels ``[B]`` int64.
"""

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
from prunecli.errors import PruneError, listed

log = logging.getLogger("prunecli")

Batch = tuple[Tensor, Tensor]
Companion = Literal["none", "class", "view"]


# ---------------------------------------------------------------------------------------------- batches


class Watched:
    """A split that remembers which of its images could not be decoded.

    Attributes:
        split: images to read.
        limit: number of unreadable images that a run accepts.
        bad: flags ``[N]``, one byte an image, in memory that worker processes share.
    """

    def __init__(self, split: Split, *, limit: int) -> None:
        self.split = split
        self.limit = limit
        flags = torch.zeros(len(split), dtype=torch.uint8)
        self.bad: Tensor = flags.share_memory_()  # type: ignore[no-untyped-call]

    def load(self, position: int) -> tuple[Image.Image, int] | None:
        """The image and its class; ``None``, and a flag in ``bad``, where it cannot be decoded."""
        try:
            return self.split.load(position)
        except UNREADABLE as error:
            if not self.bad[position]:
                self.bad[position] = 1
                log.warning("Image %s cannot be read: %s", self.split.name(position), error)
            return None

    def load_next(self, position: int) -> tuple[Image.Image, int] | None:
        """The image at ``position``, or the next readable one; ``None`` after ``limit`` unreadable images."""
        turn = itertools.chain(range(position, len(self.split)), range(position))
        found = (self.load(at) for at in itertools.islice(turn, self.limit + 1))
        return next((image for image in found if image is not None), None)

    @property
    def bad_names(self) -> tuple[str, ...]:
        """Names of the images that could not be decoded so far, in the split's order."""
        return tuple(self.split.name(int(i)) for i in self.bad.nonzero())


def require_readable(watched: Sequence[Watched], title: str) -> None:
    """Check how many images of the splits of one source could not be decoded so far.

    Args:
        watched: splits of the source, with one limit.
        title: name of the source in the message.

    Raises:
        PruneError: more images together are unreadable than the limit.
    """
    limit = watched[0].limit
    count = sum(int(one.bad.count_nonzero()) for one in watched)
    if count > limit:
        names = listed([name for one in watched for name in one.bad_names], 5)
        raise PruneError(
            f"{count} images of {title} cannot be read ({names}), more than unreadable_limit={limit}.",
            hint="Repair or remove them, or raise data.unreadable_limit.",
        )


@dataclass(frozen=True, kw_only=True)
class Samples(Dataset[Batch]):
    """A dataset that turns positions of a split into a whole batch.

    Attributes:
        watched: split to read from.
        transform: step from a decoded image to a tensor.
        vary: augmentation of the finished batch, or ``None``.
        replace: ``True`` to replace an unreadable image by the next readable one, ``False`` to leave it out.
        size: channels, height and width of an image.
    """

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
    """A dataset whose batches ``[2B]`` hold each image followed by its companion, each with its own augmentation.

    Attributes:
        samples: images.
        others: companions' images, with other random numbers.
        partners: position of the companion of every position, ``[N]``.
    """

    samples: Samples
    others: Samples
    partners: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        first, labels = self.samples.__getitems__(positions)
        second, classes = self.others.__getitems__(self.partners[list(positions)].tolist())
        if len(labels) != len(classes):  # more images are unreadable than may be: the loader will stop the run
            return first[:0], labels[:0]
        return torch.stack([first, second], dim=1).flatten(0, 1), torch.stack([labels, classes], dim=1).flatten()


def _as_it_is(batch: Any) -> Any:
    """Nothing to collate, as ``Samples`` makes whole batches. No lambda, since worker processes have to receive it."""
    return batch


class Loader(DataLoader[Batch]):
    """A DataLoader that calls ``check`` after each batch and leaves out empty ones."""

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
