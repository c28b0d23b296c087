"""Initialisation before training: the recipe's ``init`` applied to a net, with the report's row about it."""

from __future__ import annotations

import math
import time

import torch
from torch import nn

from prunecli.errors import listed
from prunecli.methods import sao
from prunecli.models.layers import activation_gain
from prunecli.recipe.methods import SaoInit
from prunecli.values.report import RecoveryStep

_SPARSITY = 0.5
_NAMED = 3  # most layers that a sentence lists


def initialise_(model: nn.Module, asked: SaoInit, input_size: tuple[int, int, int], *, seed: int) -> RecoveryStep:
    """Initialise a net in place, as the section ``init`` of the recipe asks.

    Args:
        model: the net, on the CPU.
        asked: the settings of the initialisation.
        input_size: channels, height, width of one image.
        seed: of the random weights.

    Returns:
        The row of the report.

    Raises:
        UsageError: a layer cannot be as sparse as the settings ask; nothing has been changed then.
    """
    began = time.perf_counter()
    pattern = asked.activation
    if pattern == "auto":
        gain = activation_gain(model, torch.zeros(1, *input_size))
        pattern = "relu" if math.isclose(gain, nn.init.calculate_gain("relu")) else "tanh"
    sparsity = _SPARSITY if asked.sparsity is None and asked.degree is None else asked.sparsity
    found = sao.initialise_sao_(model, sparsity=sparsity, degree=asked.degree, pattern=pattern, seed=seed)
    return RecoveryStep(
        name="init sao",
        kept=True,
        rule=_sentence(found, pattern),
        residual=found.residual,
        seconds=round(time.perf_counter() - began, 3),
    )


def _sentence(found: sao.Initialised, pattern: sao.Pattern) -> str:
    shares = sorted(found.sparse.values())
    total = len(found.sparse) + len(found.dense) + len(found.left)
    parts = [f"{len(shares)} of {total} layers start sparse and orthogonal (for {pattern})"]
    if shares:
        span = f"{shares[0]:.1%}" if shares[0] == shares[-1] else f"{shares[0]:.1%} to {shares[-1]:.1%}"
        parts = [f"{parts[0]}, {span} of their channel pairs unconnected until training connects them"]
    for layers, how in ((found.dense, "dense and orthogonal"), (found.left, "grouped, left as they were")):
        if layers:
            parts.append(f"{how}: {listed(layers, _NAMED)}")
    return "; ".join(parts)
