"""A loaded model with its origin, the value that every job begins with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from prunecli.models.build import InputSpec
from prunecli.values.plan import Cost, ModelRef


@dataclass(frozen=True, kw_only=True)
class Source:
    """A loaded model.

    Attributes:
        model: the module, on the CPU, in eval mode.
        ref: reference to build the module from again.
        spec: images that the model expects.
        digest: SHA-256 over all tensors of its state_dict.
        cost: parameters, multiply-adds and bytes.
        notes: sentences that a user should read about its weights.
    """

    model: nn.Module
    ref: ModelRef
    spec: InputSpec
    digest: str
    cost: Cost
    notes: tuple[str, ...]
