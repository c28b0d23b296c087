"""A loaded model with its origin."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from prunecli.models.build import InputSpec
from prunecli.values.plan import Cost, ModelRef


@dataclass(frozen=True, kw_only=True)
class Source:
    """A loaded model: the module (CPU, eval), where it comes from, and what it costs."""

    model: nn.Module
    ref: ModelRef
    spec: InputSpec
    digest: str
    cost: Cost
    notes: tuple[str, ...]
