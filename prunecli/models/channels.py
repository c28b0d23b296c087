"""Where the channels of coupled groups lie on a model's tensors: as rows of one member, as slices of many tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunecli.values.groups import IndexMap, Member
from prunecli.values.plan import PlannedGroup, Positions, removed_positions


def row_index(member: Member, tensor: Tensor, width: int) -> Tensor | None:
    """Positions of all channels on the member's dimension, channel by channel; None where it holds them and no more."""
    if member.index == IndexMap() and tensor.shape[member.dim] == width:
        return None
    return torch.tensor(member.index.positions(range(width)), device=tensor.device)


def rows(tensor: Tensor, dim: int, index: Tensor | None, count: int) -> Tensor:
    """``[count, values per row]``, the positions ``index`` (`row_index`) in order; a view where the layout allows.

    With as many rows as the group has channels, row j is channel j; with as many as there are positions, each is one.
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
    """The named positions as slices on their tensors' devices: a shared tensor once, what has no tensor not at all."""
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
    """What is zero in a net whose removed channels are silent: their entries in every parameter that the groups run
    through, consumers too (an activation may turn zero into something else), and in running means.

    The net is then the net without them, but for norms whose statistic runs over the channels (``PlannedGroup.norms``).
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update((name, buffer) for name, buffer in model.named_buffers() if name.endswith("running_mean"))
    return slices(tensors, removed_positions(tuple(groups)))
