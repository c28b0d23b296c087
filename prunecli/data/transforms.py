"""From a decoded image to the tensor that a model gets: evaluation preprocessing and two augmentations.

Every random number is drawn from a generator that is a function of the seed, the epoch and the image's position.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from prunecli.data.sources import ArraySplit, Split
from prunecli.errors import UsageError
from prunecli.models.build import InputSpec
from prunecli.randomness import own_randomness
from prunecli.recipe.settings import DataSettings

WRITTEN_CHARACTERS = frozenset({"digits", "torch/mnist", "torch/kmnist", "torch/qmnist"})
PAD = 4

# One value each for the kinds of random numbers, so that none repeats another's.
ORDER, CROPS, AUGMENT, CALIBRATION, SUBSET, VIEW, PARTNER, BLOCKS = range(8)


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
        """Whether resizing and cropping change nothing, so that a whole batch of pixels can be normalised at once."""
        if not isinstance(split, ArraySplit) or split.pixels.shape[1:3] != self.spec.size[1:]:
            return False
        return self.spec.crop_pct == 1 and split.pixels.ndim - 2 <= self.spec.size[0]  # colour to grey is Pillow's

    def normalised(self, pixels: Tensor) -> Tensor:
        """Uint8 pixels as float32 images ``[B, C, H, W]``, bit-equal to the transform image by image.

        Args:
            pixels: grey ``[B, H, W]`` or colour ``[B, H, W, 3]``.
        """
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
        words = np.random.SeedSequence((AUGMENT, self.seed, self.epoch, position)).generate_state(3)
        with own_randomness():
            random.seed(int(words[0]))
            np.random.seed(int(words[1]))  # noqa: NPY002 - the global one is what timm draws from
            torch.manual_seed(int(words[2]))
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


def augmentation(settings: DataSettings, spec: InputSpec) -> str:
    """Name of the training images' augmentation (``none``, ``crop_flip`` or ``timm``), with ``auto`` resolved."""
    if settings.augment != "auto":
        return settings.augment
    if settings.name in WRITTEN_CHARACTERS:
        return "none"
    return "crop_flip" if max(spec.size[1:]) <= 64 else "timm"


def mode(spec: InputSpec) -> str:
    """Pillow's mode for the model's channels: ``L`` for one, ``RGB`` for three. Raises UsageError for other numbers."""
    if spec.size[0] not in (1, 3):
        raise UsageError(f"Images have 1 or 3 channels; a model with {spec.size[0]} cannot be fed with them.")
    return "L" if spec.size[0] == 1 else "RGB"


def generator(*key: int) -> torch.Generator:
    """A torch generator on the CPU whose state is a function of ``key``."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1)
