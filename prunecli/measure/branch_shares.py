"""How much of the sum that a layer's output flows into is that layer's own: its *branch share*.

An error in a residual branch counts against the whole stream, not against the branch. The share of a layer is energy of
branch over energy of result, at the first addition or concatenation where the layer's output meets something that it
did not make; 1 where it never does. Energy is the variance between images, summed over all entries, so that it needs no
layout of the tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from prunecli.measure.activations import See, watch
from prunecli.models.layers import evaluation_mode

_MEETS: Final = frozenset({"add", "iadd", "radd", "cat", "concat", "concatenate"})


class _Dataflow(TorchFunctionMode):
    """Which computed tensor was made from which, as numbered nodes, and the energies wherever several of them meet.

    Tensors are held weakly, so a pass takes no more memory than without this.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self._numbers = itertools.count(1)
        self._nodes = WeakTensorKeyDictionary()
        self._nodes[images] = 0
        self.parents: list[tuple[int, ...]] = [()]
        self.meetings: dict[int, tuple[Sequence[tuple[int, float]], float]] = {}  # node → operands, energy of result

    def node(self, tensor: Tensor) -> int | None:
        """The number of a tensor that was computed from the images."""
        found: int | None = self._nodes.get(tensor)
        return found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        known = [(node, tensor) for tensor in given if (node := self.node(tensor)) is not None]
        meets = len(known) > 1 and getattr(func, "__name__", "").strip("_") in _MEETS
        operands = [(node, _energy(tensor)) for node, tensor in known] if meets else []  # before it works in place
        result = func(*args, **(kwargs or {}))
        if known:
            for made in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
                node = self._nodes[made] = next(self._numbers)
                self.parents.append(tuple(parent for parent, _ in known))
                if meets:
                    self.meetings[node] = operands, _energy(made)
        return result

    def share(self, node: int) -> float:
        """The branch share of what was computed as ``node``."""
        own = {node}
        for later in range(node + 1, len(self.parents)):
            operands, total = self.meetings.get(later, ((), 0.0))
            mine = [energy for parent, energy in operands if parent in own]
            if mine and len(mine) < len(operands):
                return min(1.0, sum(mine) / total) if total > 0 else 1.0
            if not own.isdisjoint(self.parents[later]):
                own.add(later)
        return 1.0


def _energy(tensor: Tensor) -> float:
    if not tensor.is_floating_point() or tensor.dim() < 2:
        return 0.0
    return float(tensor.detach().var(0, unbiased=False).double().sum())


@torch.no_grad()
def branch_shares(model: nn.Module, images: Tensor, layers: Collection[str]) -> dict[str, float]:
    """The branch share of each layer's output, 0 to 1, by module path.

    Args:
        model: the net; it runs once, in evaluation mode.
        images: a few images ``[B, C, H, W]``; with one image nothing varies, and every share is 1.
        layers: paths of modules that return one tensor; of one called several times the last call counts.
    """
    made: dict[str, int] = {}
    flow = _Dataflow(images)

    def note(name: str) -> See:
        def seen(_: Tensor, output: Tensor) -> None:
            node = flow.node(output)
            if node is not None:
                made[name] = node

        return seen

    with evaluation_mode(model), flow:
        watch(model, images, {name: note(name) for name in layers})
    return {name: flow.share(made[name]) if name in made else 1.0 for name in layers}
