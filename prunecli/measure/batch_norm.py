"""Re-estimating the running statistics of BatchNorm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunecli.errors import PruneError
from prunecli.models.layers import evaluation_mode


def recalibrate_bn_(
    model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, Tensor]], *, device: torch.device
) -> int:
    """Re-estimate the running statistics of every BatchNorm, in place.

    Statistics are reset and become the plain mean over batches (momentum ``None``) of forward passes in which only
    BatchNorm is in training mode (the recipe of Jordan et al. 2023, "REPAIR", arXiv 2211.08403). Weights do not change.

    Args:
        model: net to re-estimate; it is moved to ``device``, modes and momenta are put back.
        batches: images ``[B, C, H, W]``, alone or with labels, which are ignored. Batches should be of one size, since
            each counts the same.
        device: device of the forward passes.

    Returns:
        Number of layers re-estimated.

    Raises:
        PruneError: there are BatchNorm layers and not one batch.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    source = iter(batches)
    batch = next(source, None)  # taken before anything is reset, so that a refusal leaves the model as it was
    if batch is None:
        raise PruneError("BatchNorm cannot be re-estimated without a training image.")
    momenta = [layer.momentum for layer in layers]
    with evaluation_mode(model.to(device)), torch.no_grad():
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        try:
            while batch is not None:
                model((batch if isinstance(batch, Tensor) else batch[0]).to(device, non_blocking=True))
                batch = next(source, None)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
    return len(layers)
