"""Adding before pruning: a learned gate, open or closed, on each channel of each coupled group, on any net with a plan.

ABP (Tian et al., TNNLS 2021; the code "AAL-pruning" has the same mechanism) multiplies what a convolution puts out by
``b = 1[|a| >= 0.5]``. ``a`` starts from N(0, 1), learns with a straight-through gradient (that of b is given to a) and
is clamped to [-1, 1] after every step; how many channels stay is learnt with it.

There every convolution has gates of its own, before its norm. Here a coupled group has one vector of gates, and they
act where its channels are read: on the inputs of all layers that read them. Whatever lies before (norm, activation,
depthwise convolution, the sum of a residual stream), a closed channel then reaches nothing: it is as good as removed.
A closed gate still has a gradient, that of what the channel would have added, so it may open again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prunecli.training.penalty import Penalty
from prunecli.values.groups import Group, Member, module_of
from prunecli.values.plan import PlannedGroup

_THRESHOLD: Final = 0.5  # of |a|, from which a gate is open
_LIMIT: Final = 1.0  # of |a| after a step


def is_open(magnitudes: Tensor) -> Tensor:
    """Whether each gate is open, bool of the same shape.

    Args:
        magnitudes: ``|a|`` of the gates, any shape.
    """
    return magnitudes >= _THRESHOLD


def straight_through(gate: Tensor) -> Tensor:
    """The gate values ``b = 1[|a| >= 0.5]``, exactly 0 or 1, with the gradient of b passed to a unchanged.

    Args:
        gate: ``a``, any shape.
    """
    return is_open(gate.abs()).to(gate.dtype) + (gate - gate.detach())


def drawn_gates(groups: Sequence[PlannedGroup], *, seed: int) -> Tensor:
    """Random gates ``a ~ N(0, 1)`` for each channel of all groups in order, ``[sum of widths]``."""
    return torch.randn(sum(group.width for group in groups), generator=torch.Generator().manual_seed(seed))


def planned_gates(groups: Sequence[PlannedGroup]) -> Tensor:
    """Gates that are open where the plan keeps a channel, in the layout of ``drawn_gates``."""
    return torch.cat([torch.zeros(group.width).index_fill_(0, torch.tensor(group.keep), 1.0) for group in groups])


class Gated(nn.Module):
    """A net with gates on the channels of coupled groups; the weights under the gates do not change.

    Args:
        model: the net, which becomes a submodule.
        groups: the groups whose channels get a gate each.
        gates: the initial ``a`` ``[sum of widths]``, in the layout of ``drawn_gates``.
    """

    def __init__(self, model: nn.Module, groups: Sequence[PlannedGroup], gates: Tensor) -> None:
        super().__init__()
        self.model = model
        self.gate = nn.Parameter(gates)
        self._widths = {group.name: group.width for group in groups}
        self._gated: list[tuple[str, int, str]] = []
        for name, dim, numbers in gate_places(model, groups):
            buffer = f"_gates{len(self._gated)}"
            self.register_buffer(buffer, numbers, persistent=False)
            self._gated.append((name, dim, buffer))

    def forward(self, images: Tensor) -> Any:
        """The net's outputs for images ``[B, C, H, W]``, with closed channels left out."""
        return functional_call(self.model, self.gated(), (images,))

    def gated(self) -> dict[str, Tensor]:
        """By parameter name, the parameter times the gates of the channels that it reads."""
        places = [(name, dim, self.get_buffer(buffer)) for name, dim, buffer in self._gated]
        parameters = {name: self.model.get_parameter(name) for name, _, _ in places}
        return gated_weights(parameters, places, straight_through(self.gate))

    @torch.no_grad()
    def fold_(self) -> None:
        """Write the gates into the net's own weights, so that the net alone computes what the gated net does."""
        for name, tensor in self.gated().items():
            self.model.get_parameter(name).copy_(tensor)

    def magnitudes(self) -> dict[str, Tensor]:
        """``|a|`` ``[width]`` by group name, on the CPU."""
        parts = self.gate.detach().abs().cpu().split(list(self._widths.values()))
        return {name: part.clone() for name, part in zip(self._widths, parts, strict=True)}


class GateSteps(Penalty):
    """What a training step adds for gates: the gradient of an L1 penalty before the step, a clamp after it.

    Args:
        gate: ``a`` of a `Gated` net.
        l1: weight of the L1 penalty; 0 switches it off.
    """

    def __init__(self, gate: Tensor, l1: float) -> None:
        self._gate, self._l1 = gate, l1

    @torch.no_grad()
    def add_gradients_(self, step: int) -> None:
        """Add ``l1 * sign(a)`` to the gradient of a."""
        if self._l1 and self._gate.grad is not None:
            self._gate.grad.add_(self._gate.sign(), alpha=self._l1)

    @torch.no_grad()
    def project_(self, step: int) -> None:
        """Clamp a to [-1, 1], as in the paper."""
        self._gate.clamp_(-_LIMIT, _LIMIT)

    def open_share(self) -> float:
        """Open gates as a share of all gates."""
        return float(is_open(self._gate.detach().abs()).float().mean())


#: A parameter, one of its dimensions, and the number of the gate at each position along that dimension ``[size]``.
Gates = tuple[str, int, Tensor]


def gated_weights(parameters: Mapping[str, Tensor], places: Sequence[Gates], gates: Tensor) -> dict[str, Tensor]:
    """Parameters times their gates, by name, differentiable in both.

    Args:
        parameters: parameters by name; only those in ``places`` are read.
        places: parameters, dimensions and gate numbers from ``gate_places``.
        gates: values of all gates ``[n]``; position n, one past the last, stands for no gate.
    """
    factors = torch.cat([gates, gates.new_ones(1)])
    found: dict[str, Tensor] = {}
    for name, dim, numbers in places:
        tensor = found[name] if name in found else parameters[name]
        shape = [1] * tensor.dim()
        shape[dim] = -1
        found[name] = tensor * factors[numbers].view(shape).to(tensor.dtype)
    return found


def gate_places(model: nn.Module, groups: Sequence[Group] | Sequence[PlannedGroup]) -> list[Gates]:
    """Where the gates of all groups act.

    Gates are numbered through all groups in order; the number one past the last stands for no gate. A shared parameter
    appears under its first name. A dimension that appears twice is read by two groups at the same positions (heads,
    and the widths within them) and has both gates.

    Args:
        model: the net with the parameters.
        groups: the groups whose channels get gates.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False))
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    none = sum(group.width for group in groups)
    found: dict[tuple[str, int], list[Tensor]] = {}
    start = 0
    for group in groups:
        for member in _gated_members(group):
            if member.tensor not in tensors:
                continue
            tensor = tensors[member.tensor]
            layers = found.setdefault((first[id(tensor)], member.dim), [])
            at = torch.tensor(member.index.positions(range(group.width)))
            numbers = torch.arange(start, start + group.width).repeat_interleave(member.index.repeats)
            if any(torch.equal(layer[at], numbers) for layer in layers):
                continue  # a shared parameter, reached by another of its names
            free = next((layer for layer in layers if bool((layer[at] == none).all())), None)
            if free is None:
                free = torch.full((tensor.shape[member.dim],), none)
                layers.append(free)
            free[at] = numbers
        start += group.width
    return [(name, dim, layer) for (name, dim), layers in found.items() for layer in layers]


def _gated_members(group: Group | PlannedGroup) -> tuple[Member, ...]:
    """The members that gates multiply: all that read the channels.

    Where nothing reads them, as in the product of queries and keys, it is the first weight that produces them and its
    bias. Gate only one factor of the product; with both closed, neither would receive a gradient.
    """
    readers = tuple(member for member in group.members if member.role == "in")
    if readers:
        return readers
    first = next((member for member in group.members if member.role == "out"), None)
    if first is None:
        return ()
    place = (module_of(first.tensor), first.index)
    return tuple(member for member in group.members if (module_of(member.tensor), member.index) == place)
