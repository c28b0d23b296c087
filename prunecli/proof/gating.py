"""The proof that gates closed on a plan's removed channels compute what the cut computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from prunecli.models.channels import silencing_slices
from prunecli.models.tensors import clear_caches_
from prunecli.proof.equivalence import (
    FORWARD_ERRORS,
    FailedCheckError,
    dense_outputs_,
    drawn_copy,
    outputs_of,
    silenced_outputs,
)
from prunecli.values.plan import PlannedGroup


def gating_error(
    model: nn.Module,
    gated: Callable[[nn.Module], nn.Module],
    *,
    groups: Sequence[PlannedGroup],
    input_size: tuple[int, int, int],
    seed: int,
) -> float:
    """Relative error between the net with its gates closed on a plan's removed channels and the silenced net.

    Both run in float64 on two random images with random parameters, as in ``equivalence_error``.

    Args:
        model: dense net; it is left as it is, but for caches.
        gated: function that puts the closed gates around a copy of the net.
        groups: planned groups, without norms over their channels.
        input_size: channels, height and width of an image.
        seed: seed of parameters and images.

    Returns:
        ``max|gated - silenced| / max|silenced|``; infinite where the gated net cannot be run.
    """
    clear_caches_(model)
    net, images = drawn_copy(model, input_size, seed=seed)
    dense_outputs_(net, images, calibrated=True)
    behind = gated(net).eval()
    try:
        with torch.no_grad():
            found = outputs_of(behind, images)
        for part in silencing_slices(net, groups):
            part.zero_()
        expected = silenced_outputs(net, tuple(groups), (), images)
    except (FailedCheckError, *FORWARD_ERRORS):
        return math.inf
    return (found - expected).abs().max().item() / expected.abs().max().item()
