"""The cost of a choice of widths: parameters, multiply-adds and bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecli.values.groups import Const, Graph, Product, Size, Sum, Width
from prunecli.values.plan import Cost


@dataclass(frozen=True, kw_only=True)
class Prices:
    """The costs of a graph at any widths, as differences from the measured dense model.

    Attributes:
        graph: sizes of tensors and multiply-adds of operators.
        parameters: names of the tensors that count as parameters.
        stored: names of the tensors that count as bytes.
        base: measured cost of the dense model.
        bytes_per_element: size of one element of the stored tensors.
    """

    graph: Graph
    parameters: Sequence[str]
    stored: Sequence[str]
    base: Cost
    bytes_per_element: int

    def meter(self, metric: str) -> Meter:
        """A running total of ``macs``, ``params`` or ``bytes``, starting from the dense model."""
        tensors = self.graph.tensors
        if metric == "macs":
            return Meter([op.extents for op in self.graph.ops], start=self.base.macs)
        if metric == "params":
            return Meter([tensors[n] for n in self.parameters if n in tensors], start=self.base.params)
        extents = [tensors[n] for n in self.stored if n in tensors]
        return Meter(extents, start=self.base.bytes, unit=self.bytes_per_element)

    def cost(self, kept: Mapping[str, int]) -> Cost:
        """Predicted cost with these kept widths by group name; other groups keep all channels."""
        totals = {}
        for metric in ("params", "macs", "bytes"):
            meter = self.meter(metric)
            meter.commit(kept)
            totals[metric] = meter.total
        return Cost(**totals)


class Meter:
    """A sum of products of extents that follows changes of single groups without adding up everything again.

    Args:
        terms: the extents of each product.
        start: measured total at the dense widths; it may differ from the sum.
        unit: factor of each product.
    """

    def __init__(self, terms: Iterable[Sequence[Size]], *, start: int, unit: int = 1) -> None:
        counted = Counter(tuple(extents) for extents in terms)  # layers of equal blocks are equal products
        self._terms = list(counted)
        self._factors = [unit * count for count in counted.values()]
        self._kept: dict[str, int] = {}
        self._values = [self._value(at, {}) for at in range(len(self._terms))]
        self._of: dict[str, set[int]] = {}
        for at, term in enumerate(self._terms):
            for name in set().union(*map(_names, term)):
                self._of.setdefault(name, set()).add(at)
        self.total = start

    def _value(self, at: int, kept: Mapping[str, Any]) -> Any:
        return self._factors[at] * math.prod(extent.evaluate(kept) for extent in self._terms[at])

    def _changed(self, widths: Mapping[str, Any]) -> dict[int, Any]:
        kept = self._kept | dict(widths)
        return {at: self._value(at, kept) for at in self.products(widths)}

    def products(self, names: Iterable[str]) -> set[int]:
        """Numbers of the different products that depend on the widths of these groups."""
        return set().union(*(self._of.get(name, ()) for name in names))

    def trial(self, widths: Mapping[str, int]) -> int:
        """The total if these groups had these widths, which stay unchanged."""
        return self.total + sum(value - self._values[at] for at, value in self._changed(widths).items())

    def trials(self, widths: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
        """The totals at many widths at once, which stay unchanged: element by element what `trial` gives.

        Args:
            widths: widths by group name, in arrays of shapes that broadcast against each other.

        Returns:
            totals, in the shape that the widths broadcast to.
        """
        totals = np.full(np.broadcast_shapes(*(own.shape for own in widths.values())), self.total)
        for at, values in self._changed(widths).items():
            totals += values - self._values[at]
        return totals

    def commit(self, widths: Mapping[str, int]) -> None:
        """Set the widths of these groups."""
        for at, value in self._changed(widths).items():
            self.total += value - self._values[at]
            self._values[at] = value
        self._kept.update(widths)


def _names(size: Size) -> set[str]:
    """The groups that a size depends on."""
    match size:
        case Width():
            return {size.group}
        case Product() | Sum():
            return set().union(*map(_names, size.parts))
        case Const():
            return set()
    raise TypeError(f"unknown size {size!r}")
