"""The growing penalty: L2 and decorrelation that push channels of coupled groups towards zero, on any net with a plan.

Sources: GReg (Wang et al., ICLR 2021, arXiv 2012.09243) for the L2 penalty whose factor grows while training goes on,
and TPP (Wang and Fu, ICLR 2023, arXiv 2207.12534) for the decorrelation of pruned from kept filters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunecli.methods.phase import Phase
from prunecli.models.channels import row_index, rows, silencing_slices, slices
from prunecli.training.penalty import Penalty, gram_loss
from prunecli.values.groups import Member, module_of
from prunecli.values.plan import PlannedGroup, Positions, channel_positions


@dataclass(frozen=True, kw_only=True)
class _Matrix:
    """The weight of one producing member: its filters, several a channel where a channel is a whole head.

    Attributes:
        weight: the whole tensor, of any layout.
        dim: the dimension of the filters.
        index: positions of the filters along ``dim`` ``[n]``; ``None`` for all in order.
        kept: whether each filter stays, bool ``[n]``.
    """

    weight: Tensor
    dim: int
    index: Tensor | None
    kept: Tensor

    def loss(self) -> Tensor:
        """The decorrelation loss of these filters, see ``gram_loss``."""
        return gram_loss(rows(self.weight, self.dim, self.index, len(self.kept)), self.kept)


class GrowingPenalty(Penalty):
    """An L2 penalty with a growing factor on the channels of coupled groups, with decorrelation in TPP.

    The gradients of their weights, biases, norm scales and shifts get ``λ(step)`` times the value (growing L2), the
    objective ``gram_weight * λ(step)`` times the sum of `gram_loss` over all producing matrices. From ``zero_from`` on
    the groups are set to zero one after the other, in network order, and stay so.

    Args:
        model: the net, on the device it trains on.
        groups: the groups of the plan. Channels that it removes are pushed; in a phase before the plan is made, all
            channels of the groups that are cut.
        phase: factors and steps of the penalty.
    """

    def __init__(self, model: nn.Module, groups: Sequence[PlannedGroup], phase: Phase) -> None:
        cut = [group for group in groups if group.is_cut]
        parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        self._phase = phase
        self._pushed = slices(parameters, _pushed_positions(cut, parameters, phase))
        self._matrices = _matrices(cut, parameters) if phase.gram_weight else []
        self._silent = [silencing_slices(model, [group]) for group in cut]

    def gram(self) -> Tensor:
        """The sum of the Gram losses over all producing matrices, without any weight."""
        return torch.stack([matrix.loss() for matrix in self._matrices]).sum()

    def norm(self) -> float:
        """Frobenius norm of all pushed values together."""
        squares = [part.values().float().square().sum() for part in self._pushed]
        return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0

    def loss(self, step: int) -> Tensor | None:
        """The weighted decorrelation; ``None`` without one or while λ is 0."""
        reg = self._phase.reg(step)
        return self._phase.gram_weight * reg * self.gram() if self._matrices and reg else None

    @torch.no_grad()
    def add_gradients_(self, step: int) -> None:
        """Add the gradient of ``λ / 2 * value^2`` for every pushed value."""
        reg = self._phase.reg(step)
        for part in self._pushed:
            if part.tensor.grad is not None:
                part.tensor.grad.index_add_(part.dim, part.index, part.values(), alpha=reg)

    def project_(self, step: int) -> None:
        """Set the groups to zero whose turn has come."""
        for group in self._silent[: self._phase.zeroed(step + 1, len(self._silent))]:
            for part in group:
                part.zero_()


def _pushed_positions(cut: Sequence[PlannedGroup], parameters: Mapping[str, Tensor], phase: Phase) -> Positions:
    """Where the pushed channels lie in what produces, shifts and scales them; consumers are left alone."""

    def is_pushed(member: Member, producing: set[str]) -> bool:
        if member.role == "in" or member.tensor not in parameters:
            return False
        vector = parameters[member.tensor].dim() == 1
        return phase.bn_term or not vector or module_of(member.tensor) in producing  # else a bias

    chosen = []
    for group in cut:
        producing = {module_of(member.tensor) for member in group.members if member.role == "out"}
        members = tuple(member for member in group.members if is_pushed(member, producing))
        channels = range(group.width) if phase.before_plan else sorted(set(range(group.width)) - set(group.keep))
        chosen.append((group.model_copy(update={"members": members}), channels))
    return channel_positions(chosen)


def _matrices(cut: Sequence[PlannedGroup], parameters: Mapping[str, Tensor]) -> list[_Matrix]:
    found = []
    for group in cut:
        for member in group.members:
            weight = parameters.get(member.tensor)
            if weight is None or member.role != "out" or weight.dim() < 2:
                continue
            kept = torch.zeros(group.width, dtype=torch.bool, device=weight.device)
            kept[list(group.keep)] = True
            kept = kept.repeat_interleave(member.index.repeats)
            index = row_index(member, weight, group.width)
            found.append(_Matrix(weight=weight, dim=member.dim, index=index, kept=kept))
    return found
