"""What is known of a model before it is cut."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from prunecli.values.groups import Graph
from prunecli.values.plan import Cost, ModelRef


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The result of ``prunecli inspect``.

    Attributes:
        model: reference to build the model from again.
        input_size: channels, height and width of an image.
        cost: parameters, multiply-adds and bytes of the dense model.
        graph: coupled groups and the axes that stay whole; groups that failed a trial cut are among the latter.
        prunable_share: share of the parameters that lie in tensors with a prunable axis, 0 to 1.
        supported: whether half of every group could be cut correctly.
        status: ``supported`` as a sentence.
    """

    model: ModelRef
    input_size: tuple[int, int, int]
    cost: Cost
    graph: Graph
    prunable_share: float
    supported: bool
    status: str

    def to_mapping(self) -> dict[str, Any]:
        """A JSON document: costs, groups with their layers, frozen axes with their reasons."""
        return {
            "model": self.model.name,
            "input_size": list(self.input_size),
            "engine": self.graph.engine,
            "cost": self.cost.model_dump(),
            "prunable_share": self.prunable_share,
            "supported": self.supported,
            "status": self.status,
            "groups": [
                {
                    "name": group.name,
                    "kind": group.kind,
                    "width": group.width,
                    "writes": list(group.layers("out")),
                    "reads": list(group.layers("in")),
                    "norms": list(group.norms),
                }
                for group in self.graph.groups
            ],
            "frozen": [asdict(axis) for axis in self.graph.frozen],
            "ties": [list(tie.groups) for tie in self.graph.ties],
            "exclusive": [list(names) for names in self.graph.exclusive],
            "unknown_ops": dict(self.graph.unknown_ops),
        }
