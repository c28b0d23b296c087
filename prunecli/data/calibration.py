"""Images to calibrate with: no label is read, so any folder of photographs will do.

Both sources, the data of a job (``images.Images``) and a folder (``CalibrationFolder``), are a ``CalibrationSource``.
What a net reads and makes of such images decides BatchNorm statistics, least squares and rankings by data.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from prunecli.data.loader import Batch, Samples, Watched, require_readable
from prunecli.data.sources import FolderSplit
from prunecli.data.transforms import CALIBRATION, EvalTransform, generator, mode
from prunecli.errors import PruneError, UsageError, one_line
from prunecli.models.build import InputSpec
from prunecli.recipe.settings import DataSettings

log = logging.getLogger("prunecli")


class CalibrationSource(Protocol):
    """Images without labels, in one order that the seed of the job decides."""

    @property
    def size(self) -> int:
        """Number of images that there are to calibrate with, unreadable ones included."""

    @property
    def description(self) -> str:
        """The images in words, such as ``the training images of torch/cifar10``."""

    def unlabelled(self, count: int, start: int = 0) -> Tensor:
        """Images ``[N, C, H, W]`` in evaluation preprocessing, float32; the same ones at every call.

        Ranges that do not overlap have no image in common, since only readable images count.

        Args:
            count: number of images; fewer come where the source ends.
            start: number of readable images to pass over at the head of the order.

        Raises:
            PruneError: more images are unreadable than ``unreadable_limit``.
        """


class SeededOrder:
    """The readable images of a split, in an order that the seed decides. Unreadable ones are passed over."""

    def __init__(self, samples: Samples, *, seed: int, title: str) -> None:
        """Draw the order.

        Args:
            samples: source of the images, which leaves unreadable ones out.
            seed: seed of the order.
            title: name of the images in messages.
        """
        self._samples = samples
        self._title = title
        self._order = torch.randperm(len(samples), generator=generator(CALIBRATION, seed))
        self._nothing: Batch = torch.empty(0, *samples.size), torch.empty(0, dtype=torch.int64)
        self._tried = 0  # so many images at the head of the order were decoded at least once

    def batch(self, count: int, start: int = 0) -> Batch:
        """Images ``start`` to ``start + count`` of the readable ones, and their labels; fewer where the order ends.

        Raises:
            PruneError: more images are unreadable than the split's limit.
        """
        parts: list[Batch] = []
        missing, at = count, self._place(start)
        while missing and at < len(self._order):
            positions = self._order[at : at + missing].tolist()
            parts.append(self._samples.__getitems__(positions))
            missing -= len(parts[-1][1])
            at += len(positions)
            self._tried = max(self._tried, at)
            require_readable([self._samples.watched], self._title)
        if len(parts) == 1:
            return parts[0]  # the usual case, without a copy
        images, labels = zip(self._nothing, *parts, strict=True)
        return torch.cat(images), torch.cat(labels)

    def _place(self, start: int) -> int:
        """The place in the order behind its first ``start`` readable images, found by decoding what was not yet."""
        watched = self._samples.watched
        passed = 0
        for at in range(len(self._order)):
            if passed == start:
                return at
            position = int(self._order[at])
            if at == self._tried:
                watched.load(position)
                self._tried += 1
                require_readable([watched], self._title)
            passed += not watched.bad[position]
        return len(self._order)


class CalibrationFolder:
    """The images below a folder, at any depth; a ``CalibrationSource``, made by ``open_calibration``."""

    def __init__(self, split: FolderSplit, *, spec: InputSpec, limit: int, seed: int) -> None:
        """Draw the order of the images.

        Args:
            split: files of the images.
            spec: images that the model expects.
            limit: number of unreadable images that a run accepts.
            seed: seed of the order.
        """
        self._root = split.root
        self._watched = Watched(split, limit=limit)
        samples = Samples(watched=self._watched, transform=EvalTransform(spec), replace=False, size=spec.size)
        self._order = SeededOrder(samples, seed=seed, title=str(split.root))

    @property
    def size(self) -> int:
        """Number of image files, unreadable ones included."""
        return len(self._watched.split)

    @property
    def description(self) -> str:
        """The images in words."""
        return f"the images below {self._root}"

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Paths of the images that could not be decoded so far."""
        return self._watched.bad_names

    def unlabelled(self, count: int, start: int = 0) -> Tensor:
        """Images ``[N, C, H, W]``, as ``CalibrationSource.unlabelled``; a warning where they are fewer than asked for.

        Raises:
            PruneError: more images are unreadable than ``unreadable_limit``.
        """
        images, _ = self._order.batch(count, start)
        if len(images) < count:
            where = f"{self._root}, behind the first {start}," if start else str(self._root)
            log.warning("Calibration folder %s has %d readable images; %d were asked for.", where, len(images), count)
        return images


def open_calibration(settings: DataSettings, spec: InputSpec, *, seed: int) -> CalibrationFolder:
    """Find the images of ``data.calibration``. Folders mean nothing, neither as classes nor as splits.

    Files count by their ending. Names that begin with a dot are passed over; links to folders are followed, and no
    folder is entered twice.

    Args:
        settings: section ``data`` of the recipe; ``calibration`` and ``unreadable_limit`` count.
        spec: images that the model expects.
        seed: seed of the order.

    Raises:
        UsageError: no folder is named, or there is none of that name.
        PruneError: the folder holds no images, or cannot be listed.
    """
    if settings.calibration is None:
        raise UsageError("No calibration images are given.", hint="Give data.calibration=FOLDER.")
    root = Path(settings.calibration)
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise UsageError(f"Calibration folder {root} {what}.", hint="data.calibration names a folder of images.")
    files = _image_files(root)
    if not files:
        raise PruneError(
            f"Calibration folder {root} holds no images, at any depth.",
            hint=f"Expected files that end in {', '.join(IMG_EXTENSIONS)}.",
        )
    # FolderSplit wants a class for each file; nothing reads it here
    split = FolderSplit(root=root, files=tuple((file, 0) for file in files), mode=mode(spec))
    return CalibrationFolder(split, spec=spec, limit=settings.unreadable_limit, seed=seed)


def _image_files(root: Path) -> list[str]:
    """Paths below ``root`` of all images, sorted, so that no file system decides the order. Raises PruneError."""

    def refuse(error: OSError) -> None:
        raise PruneError(f"Calibration folder {root} cannot be read: {one_line(error)}.") from error

    found, entered = [], set()
    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        inside = Path(folder)
        if (real := inside.resolve()) in entered:  # a link leads back, or here by a second name
            below.clear()
            continue
        entered.add(real)
        below[:] = sorted(name for name in below if name[0] != ".")
        images = (inside / name for name in names if name[0] != "." and name.lower().endswith(IMG_EXTENSIONS))
        found += [str(image.relative_to(root)) for image in images if image.is_file()]
    return sorted(found)
