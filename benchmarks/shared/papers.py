"""What the papers' tables share: the cut, a fresh initialisation, images as tensors, and how a cell is written."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from prunecli.recipe.recipe import Recipe
from prunecli.run.plan_and_prove import plan_and_prove
from prunecli.run.source import load_source
from prunecli.surgery.cut import cut


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images ``[N, C, H, W]``, normalised, and labels ``[N]``, on the device that trains."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Split:
        return Split(images=self.images.to(device), labels=self.labels.to(device))


def stacked(loader: Iterable[tuple[Tensor, Tensor]]) -> Split:
    """All batches of a loader as one split."""
    images, labels = zip(*loader, strict=True)
    return Split(images=torch.cat(images), labels=torch.cat(labels))


def pruned(net: str, weights: Path, ratio: float, *, select: Sequence[str]) -> nn.Module:
    """A smaller copy of the base: filters with the smallest L1 norm leave each layer, by prunecli's own plan."""
    recipe = Recipe.from_mapping(
        {
            "model": net,
            "weights": str(weights),
            "target": f"ratio={ratio:g}",
            "prune": {"criterion": "l1", "ranking": "local", "round_to": 1, "select": list(select)},
        }
    )
    source = load_source(recipe)
    plan = plan_and_prove(source, recipe, None)[0].plan
    return cut(source.model, plan)


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the small net with PyTorch's own initialisation."""
    copied = copy.deepcopy(model)
    torch.manual_seed(seed)
    for module in copied.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return copied


def spread(values: Sequence[float]) -> str:
    """Mean and population standard deviation, as the papers print them."""
    return f"{statistics.fmean(values):.2f}({statistics.pstdev(values):.2f})"


def row(cells: Sequence[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
