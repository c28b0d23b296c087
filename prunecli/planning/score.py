"""Importance of every channel of every group, by criterion: pure functions from tensors to one number a channel.

A channel's share of a member is a row of the matrix ``[width, values per channel]``, whatever the tensor's layout; all
criteria are stated on these rows ``w_j``. Low scores leave first. Results are float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from prunecli.errors import PruneError, UsageError, nearest
from prunecli.measure.layer_inputs import InputStatistics
from prunecli.models.channels import row_index, rows
from prunecli.planning.losses import UnitLosses
from prunecli.planning.reader_views import View, ViewsOf, views_of
from prunecli.planning.selection import forward_scores, variance_scores
from prunecli.values.groups import Group, Member, Role, module_of, tensor_name

_BLOCK = 1 << 18  # values reduced at a time: 2 MiB in float64
DATA_DRIVEN: Final = frozenset({"varw", "forward"})  # criteria that look at what layers read


@dataclass(frozen=True, kw_only=True)
class _Evidence:
    """The data that a criterion may read.

    Attributes:
        group: the group whose channels are scored.
        tensors: parameters and buffers by name.
        gradients: gradients of the loss by tensor name; empty without.
        generator: source of random numbers; ``None`` without.
        views: how the layers that read the group weigh its channels; ``None`` without statistics of their inputs.
    """

    group: Group
    tensors: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    generator: torch.Generator | None
    views: ViewsOf | None = None

    def rows(self, member: Member, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """``[width, values per channel]`` of one member; a view of the tensor where its layout allows."""
        tensor = (self.tensors if values is None else values)[member.tensor].detach()
        width = self.group.width
        return rows(tensor, member.dim, row_index(member, tensor, width), width)

    def producers(self) -> list[Tensor]:
        """Rows of the weights that produce the channels: filters and matrix rows, without biases."""
        return self._weights("out")

    def consumers(self) -> list[Tensor]:
        """Rows of the weights that read the channels."""
        return self._weights("in")

    def _weights(self, role: Role) -> list[Tensor]:
        members = [m for m in self.group.members if m.role == role and m.tensor in self.tensors]
        return [self.rows(m) for m in members if self.tensors[m.tensor].dim() >= 2]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The importance of every channel, with the criterion behind it.

    Attributes:
        criterion: name of the criterion, as the plan records it.
        seed: seed of the random numbers behind the scores.
        channels: importance ``[width]`` by group name, float64 on the CPU; low leaves first.
        losses: what the widths of each unit cost the model, for ranking ``loss``; ``None`` where nothing was measured.
    """

    criterion: str
    seed: int
    channels: Mapping[str, Tensor]
    losses: UnitLosses | None = None


def score_model(
    model: nn.Module,
    groups: Iterable[Group],
    *,
    criterion: str,
    seed: int,
    gradients: Mapping[str, Tensor] | None = None,
    statistics: InputStatistics | None = None,
) -> Scores:
    """Scores of a model's channels from its parameters and buffers.

    Args:
        model: the model with the weights to score.
        groups: the groups whose channels are scored.
        criterion: a key of ``CRITERIA``.
        seed: seed of ``random``.
        gradients: gradients of the loss by parameter name; needed for ``taylor``.
        statistics: what the model's layers read; needed for ``varw`` and ``forward``.

    Raises:
        UsageError: the criterion is unknown, or cannot score any group of this model.
        PruneError: the weights of a group are not finite.
        ValueError: ``taylor`` is used without gradients, or ``varw`` or ``forward`` without statistics.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    generator = torch.Generator().manual_seed(seed)
    views = None if statistics is None else partial(views_of, model, statistics)
    channels = score_groups(groups, tensors, criterion=criterion, gradients=gradients, generator=generator, views=views)
    return Scores(criterion=criterion, seed=seed, channels=channels)


def score_groups(
    groups: Iterable[Group],
    tensors: Mapping[str, Tensor],
    *,
    criterion: str,
    gradients: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    views: ViewsOf | None = None,
) -> dict[str, Tensor]:
    """Scores ``[width]`` by group name. A group that the criterion cannot score (no BatchNorm …) is left out.

    Args:
        groups: the groups whose channels are scored, in the order of the random numbers.
        tensors: parameters and buffers by name; members whose tensor is missing are ignored.
        criterion: a key of ``CRITERIA``.
        gradients: gradients of the loss by tensor name; needed for ``taylor``.
        generator: source of random numbers; needed for ``random``.
        views: how the readers of a group weigh its channels; needed for ``varw`` and ``forward``.

    Raises:
        UsageError: an unknown criterion, or one that cannot score any group of this model.
        PruneError: weights that are not finite.
        ValueError: ``taylor`` without gradients, ``random`` without a generator, ``varw`` or ``forward`` without views.
    """
    if criterion not in CRITERIA:
        raise UsageError(f"Unknown criterion {criterion!r}.", hint=nearest(criterion, CRITERIA))
    if criterion == "taylor" and gradients is None:
        raise ValueError("taylor needs gradients")
    if criterion == "random" and generator is None:
        raise ValueError("random needs a generator")
    if criterion in DATA_DRIVEN and views is None:
        raise ValueError(f"{criterion} needs views")
    scores = {}
    named = list(groups)
    for group in named:
        evidence = _Evidence(group=group, tensors=tensors, gradients=gradients or {}, generator=generator, views=views)
        values = CRITERIA[criterion](evidence)
        if values is None:
            continue
        if not torch.isfinite(values).all():
            raise PruneError(f"The weights of group {group.name} are not finite, so its channels cannot be ranked.")
        scores[group.name] = values
    if named and not scores:
        raise UsageError(
            f"Criterion {criterion!r} says nothing about any coupled group of this model.", hint="Use l1 or group_norm."
        )
    return scores


# ---------------------------------------------------------------------------------------------- criteria


def _total(rows: Iterable[Tensor], reduce: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Sum over members of ``reduce(rows) -> [width]``; ``None`` without members.

    ``reduce`` gets a few rows at a time, in float64 on the CPU, so that no weight is copied as a whole.
    """
    parts = []
    for part in rows:
        blocks = part.split(max(1, _BLOCK // max(1, part.shape[1])))
        parts.append(torch.cat([reduce(_exact(block)) for block in blocks]))
    return torch.stack(parts).sum(0) if parts else None


def _exact(rows: Tensor) -> Tensor:
    """A copy in float64 on the CPU."""
    return rows.to("cpu", torch.float64, memory_format=torch.contiguous_format)


def _weights_or_all(evidence: _Evidence) -> list[Tensor]:
    """The producing weights; for an axis without any, whatever reads it."""
    return evidence.producers() or evidence.consumers()


def l1(evidence: _Evidence) -> Tensor | None:
    """``sum |w_j|`` over the filters that produce channel j (Li et al. 2017)."""
    return _total(_weights_or_all(evidence), lambda w: w.abs().sum(1))


def l2(evidence: _Evidence) -> Tensor | None:
    """``sqrt(sum w_j^2)`` over the filters that produce channel j."""
    squares = _total(_weights_or_all(evidence), lambda w: w.square().sum(1))
    return None if squares is None else squares.sqrt()


def group_norm(evidence: _Evidence) -> Tensor | None:
    """``I_j = mean over members of sum w_j^2``, divided by the mean of I.

    Members are all weights that produce or read the channel (DepGraph, Fang et al. 2023, equation 5 as Torch-Pruning's
    GroupMagnitudeImportance computes it with p = 2).
    """
    members = evidence.producers() + evidence.consumers()
    total = _total(members, lambda w: w.square().sum(1))
    if total is None:
        return None
    values = total / len(members)
    mean = values.mean()
    return values / mean if mean > 0 else values


def bn_scale(evidence: _Evidence) -> Tensor | None:
    """``sum |gamma_j|`` over the BatchNorms on the channel (Network Slimming, Liu et al. 2017)."""
    scales = [
        evidence.rows(m)
        for m in evidence.group.members
        if m.tensor.endswith("weight") and tensor_name(module_of(m.tensor), "running_var") in evidence.tensors
    ]
    return _total(scales, lambda gamma: gamma.abs().sum(1))


def lamp(evidence: _Evidence) -> Tensor | None:
    """``s_j / sum of s_k over all k with s_k >= s_j``, ``s_j = sum w_j^2`` over the producing filters.

    LAMP (Lee et al. 2021, equation 4) with filters in the place of single weights; equal ones count in index order.
    """
    squares = _total(_weights_or_all(evidence), lambda w: w.square().sum(1))
    if squares is None:
        return None
    ascending, order = squares.sort(stable=True)
    remaining = ascending.flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(squares)
    scores[order] = ascending / remaining.clamp(min=torch.finfo(torch.float64).tiny)
    return scores


def fpgm(evidence: _Evidence) -> Tensor | None:
    """``sum_k |w_j - w_k|_2`` over the filters of each producer (He et al. 2019): low is replaceable by the others."""
    parts = [torch.cdist(w, w).sum(1) for w in map(_exact, _weights_or_all(evidence))]
    return torch.stack(parts).sum(0) if parts else None


def taylor(evidence: _Evidence) -> Tensor | None:
    """``sum over members of |sum w_j * dL/dw_j|``: first-order change of the loss when the channel goes.

    Molchanov et al. 2019, summed over the members as in Torch-Pruning. A filter before BatchNorm in train mode has
    ``w . g = 0`` (its scale does not matter); the norm's own scale and the consumers still count.
    """
    known = [m for m in evidence.group.members if m.tensor in evidence.gradients]
    pairs = ((_exact(evidence.rows(m)), _exact(evidence.rows(m, evidence.gradients))) for m in known)
    parts = [(weight * gradient).sum(1).abs() for weight, gradient in pairs]
    return torch.stack(parts).sum(0) if parts else None


def random(evidence: _Evidence) -> Tensor | None:
    """Uniform on [0, 1): the baseline."""
    return torch.rand(evidence.group.width, generator=evidence.generator, dtype=torch.float64)


def varw(evidence: _Evidence) -> Tensor | None:
    """The energy that all readers get from channel j, as shares of what counts (`variance_scores`); else ``l2``."""
    return _by_readers(evidence, variance_scores)


def forward(evidence: _Evidence) -> Tensor | None:
    """The place of channel j in a greedy forward selection by all readers (`forward_scores`); else ``l2``."""
    return _by_readers(evidence, forward_scores)


def _by_readers(evidence: _Evidence, score: Callable[[Sequence[View], int], Tensor]) -> Tensor | None:
    """The score by a group's views; ``l2`` where nothing linear reads it (queries and keys)."""
    assert evidence.views is not None
    views = evidence.views(evidence.group)
    return score(views, evidence.group.width) if views else l2(evidence)


CRITERIA: dict[str, Callable[[_Evidence], Tensor | None]] = {
    "l1": l1,
    "l2": l2,
    "group_norm": group_norm,
    "bn_scale": bn_scale,
    "lamp": lamp,
    "fpgm": fpgm,
    "taylor": taylor,
    "varw": varw,
    "forward": forward,
    "random": random,
}
