"""Calibration: the unlabelled images of a job, and what nets make of them, each taken once."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor, nn

from prunecli.data.calibration import CalibrationSource
from prunecli.measure.layer_inputs import Coupled, InputStatistics, input_statistics
from prunecli.models.tensors import state_digest

_PASS = 64  # images in one forward pass, so that activations stay small beside the statistics


class Calibration:
    """Unlabelled images by which channels are chosen and layers are solved, in three parts that do not overlap.

    The first images of the source's order judge what was made from the others: ``held_out`` of them by the KL
    divergence, and up to ``judged`` by the labelled trials of the recovery. ``images`` behind them are what statistics
    are taken from. Of a small source at most a quarter is held out, and nothing else is kept back.

    Args:
        source: the images.
        images: number of images for statistics.
        held_out: number of images that no statistic looks at.
        judged: number of images at the head of the order that labelled trials are judged on.
        device: device of the images that are handed out.
    """

    def __init__(
        self, source: CalibrationSource, *, images: int, held_out: int, judged: int, device: torch.device
    ) -> None:
        self.device = device
        self._source = source
        self._held = max(1, min(held_out, source.size // 4))
        self._start = min(max(self._held, min(judged, source.size - images)), source.size - 1)
        self._wanted = images
        self._read: Tensor | None = None
        self._held_out: Tensor | None = None
        self._statistics: dict[str, tuple[frozenset[str], InputStatistics]] = {}

    @property
    def held_out(self) -> Tensor:
        """Images ``[N, C, H, W]`` that no statistic looks at (but where there is only one image)."""
        if self._held_out is None:
            self._held_out = self._source.unlabelled(self._held, 0).to(self.device)
        return self._held_out

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """The images for statistics, in batches ``[B, C, H, W]``."""
        return self.first(self._wanted).split(_PASS)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the pixels of all images that choices rest on, held out or not."""
        return state_digest({"held_out": self.held_out, "images": self.first(self._wanted)})

    def first(self, count: int) -> Tensor:
        """At most ``count`` images ``[N, C, H, W]``: those for statistics, then others behind them."""
        if self._read is None or len(self._read) < count:
            there_are = min(max(count, self._wanted), self._source.size - self._start)
            self._read = self._source.unlabelled(there_are, self._start).to(self.device)
        return self._read[:count]

    def statistics(self, model: nn.Module, groups: Iterable[Coupled]) -> InputStatistics:
        """What the layers that read the axes of ``groups`` are given in a net, see `input_statistics`.

        Args:
            model: the net, on the device of the images; equal weights are looked at once.
            groups: coupled groups of the net, or planned ones.
        """
        groups = list(groups)
        reading = frozenset(m.tensor for group in groups for m in group.members if m.role == "in")
        key = state_digest(model.state_dict())
        known = self._statistics.get(key)
        if known is None or not reading <= known[0]:
            known = self._statistics[key] = reading, input_statistics(model, groups, self.batches)
        return known[1]
