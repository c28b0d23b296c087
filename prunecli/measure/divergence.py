"""How far a pruned net's answers are from the dense net's: the KL divergence, which needs no labels."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from prunecli.models.layers import evaluation_mode
from prunecli.models.outputs import logits_of

_PASS: Final = 64  # images in one forward pass
_WORST: Final = 1e4  # nats; the value of a divergence that is not finite


@torch.no_grad()
def log_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """Log-probabilities ``[N, K]`` of a net in evaluation mode, float64 on the CPU.

    Args:
        model: the net.
        images: images ``[N, C, H, W]`` on its device.
    """
    with evaluation_mode(model):
        logits = torch.cat([logits_of(model(batch)) for batch in images.split(_PASS)])
    return as_log_probabilities(logits)


def as_log_probabilities(logits: Tensor) -> Tensor:
    """Logits as log-probabilities of the same shape, float64 on the CPU."""
    return logits.detach().cpu().double().log_softmax(1)


def divergences(dense: Tensor, pruned: Tensor) -> Tensor:
    """``KL(dense || pruned)`` of every image ``[N]`` in nats, float64.

    Args:
        dense: log-probabilities of the dense net ``[N, K]``.
        pruned: log-probabilities of the pruned net; an image on which they are not finite counts as 1e4 nats.
    """
    found = kl_div(pruned, dense, log_target=True, reduction="none").sum(1)
    return found.nan_to_num(nan=_WORST, posinf=_WORST).clamp(0, _WORST)
