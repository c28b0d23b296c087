"""Sources made of a module at hand."""

from __future__ import annotations

from torch import nn

from prunecli.measure import cost
from prunecli.models.build import InputSpec
from prunecli.models.source import Source
from prunecli.values.plan import ModelRef


def source_of(model: nn.Module, size: tuple[int, int, int]) -> Source:
    channels = size[0]
    return Source(
        model=model.eval(),
        ref=ModelRef(name="toy", num_classes=5, timm="0"),
        spec=InputSpec(size=size, mean=(0.5,) * channels, std=(0.5,) * channels, interpolation="bicubic", crop_pct=1.0),
        digest="",
        cost=cost.measure(model, size),
        notes=(),
    )
