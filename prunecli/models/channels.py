"""Where the channels of coupled groups lie on a model's tensors: as rows of one member, as slices of many tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunecli.values.groups import IndexMap, Member
from prunecli.values.plan import PlannedGroup, Positions, removed_positions


def row_index(member: Member, tensor: Tensor, width: int) -> Tensor | None:
    """Positions of all channels on the member's dimension, channel by channel, on the tensor's device.

    Args:
        member: place where the group's axis runs through ``tensor``.
        tensor: tensor that the member names.
        width: number of channels of the group.

    Returns:
        Index ``[width * repeats]``, or ``None`` where the dimension holds the channels in order and nothing else.
    """
    if member.index == IndexMap() and tensor.shape[member.dim] == width:
        return None
    return torch.tensor(member.index.positions(range(width)), device=tensor.device)


def rows(tensor: Tensor, dim: int, index: Tensor | None, count: int) -> Tensor:
    """A tensor as a matrix ``[count, values per row]`` of chosen positions of one dimension.

    Args:
        tensor: any tensor; the result is a view of it where the layout allows.
        dim: dimension that becomes the rows.
        index: positions on ``dim`` in order, from `row_index`; ``None`` for all.
        count: number of rows. With the group's width row j is channel j, with the number of positions row j is one.
    """
    if index is not None:
        tensor = tensor.index_select(dim, index)
    return tensor.movedim(dim, 0).reshape(count, -1)


@dataclass(frozen=True)
class Slice:
    """Entries ``index`` along dimension ``dim`` of a tensor that a model holds."""

    tensor: Tensor
    dim: int
    index: Tensor

    def values(self) -> Tensor:
        """A copy of the entries, without gradient."""
        return self.tensor.detach().index_select(self.dim, self.index)

    @torch.no_grad()
    def zero_(self) -> None:
        """Set the entries to zero."""
        self.tensor.index_fill_(self.dim, self.index, 0)


def slices(tensors: Mapping[str, Tensor], positions: Positions) -> list[Slice]:
    """The named positions as slices on their tensors' devices.

    Args:
        tensors: name → tensor; aliases of one tensor give one slice.
        positions: tensor name → dimension → positions; names that ``tensors`` lacks are left out.
    """
    found: dict[tuple[int, int], tuple[Tensor, set[int]]] = {}
    for name, dims in positions.items():
        for dim, places in dims.items():
            if name in tensors:
                found.setdefault((id(tensors[name]), dim), (tensors[name], set()))[1].update(places)
    return [
        Slice(tensor, dim, torch.tensor(sorted(places), device=tensor.device))
        for (_, dim), (tensor, places) in found.items()
    ]


def silencing_slices(model: nn.Module, groups: Sequence[PlannedGroup]) -> list[Slice]:
    """The entries to set to zero so that the removed channels are silent.

    These are the channels' entries in every parameter that the groups run through, consumers too (an activation may
    turn zero into something else), and in running means. The silenced net computes what the cut net does, but for norms
    whose statistic runs over the channels (``PlannedGroup.norms``).

    Args:
        model: dense net; it is not changed.
        groups: planned groups; uncut ones are ignored.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update((name, buffer) for name, buffer in model.named_buffers() if name.endswith("running_mean"))
    return slices(tensors, removed_positions(tuple(groups)))
