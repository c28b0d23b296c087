"""Cutting: remove the planned channels from every tensor of a module, and make its attributes follow.

No decision is taken here and no model family is known: the plan names every position, attribute and attention scale.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunecli.errors import UnsupportedError
from prunecli.models.tensors import clear_caches_, like, named_tensors, replace_, tensor_at
from prunecli.surgery.structure import as_type_of, plain_value
from prunecli.values.groups import AttributeEdit, ScaleFold, tensor_name
from prunecli.values.plan import Plan, PlannedGroup, removed_positions

# ---------------------------------------------------------------------------------------------- cut


def cut_(
    model: nn.Module,
    *,
    groups: Sequence[PlannedGroup],
    attributes: Sequence[AttributeEdit],
    folds: Sequence[ScaleFold],
) -> None:
    """Remove the planned channels from every tensor they run through, in place.

    Everything is checked first, so that a refused plan leaves the model as it was. Shared tensors stay shared;
    dtype, device, requires_grad and memory format are kept; gradients are dropped; caches are cleared.

    Args:
        model: module to cut, on any device, meta included.
        groups: planned groups; uncut ones are ignored.
        attributes: edits, made after the tensors; a ``name`` may lead into a container (``feature_info.0.num_chs``).
        folds: attention scales; those of uncut groups are ignored.

    Raises:
        UnsupportedError: a tensor, position or attribute of the plan does not exist in this model, or nothing of a
            dimension would be left. Names the place and the shape.
    """
    edits = [_checked_edit(model, edit) for edit in attributes]
    tensors = named_tensors(model)
    removed = _removed_by_tensor(tensors, groups)
    scales = _fold_factors(tensors, groups, folds)
    new: dict[int, Tensor] = {}
    known: dict[_Cut, Tensor] = {}
    for name, tensor in tensors.items():
        dims, factors = removed.get(id(tensor), {}), scales.get(id(tensor), ())
        if id(tensor) not in new and (dims or factors):
            new[id(tensor)] = like(tensor, _cut_tensor(name, tensor, dims, factors, known))
    clear_caches_(model, keep=frozenset(m.tensor for group in groups for m in group.members))
    replace_(model, new)
    for edit in edits:
        edit.apply()
    for _, module in model.named_modules():
        _follow_weight_(module)


def require_fit(
    model: nn.Module,
    *,
    groups: Sequence[PlannedGroup],
    attributes: Sequence[AttributeEdit],
    folds: Sequence[ScaleFold],
) -> None:
    """Make the checks that ``cut_`` begins with; nothing is changed.

    Args:
        model: module that is to be cut.
        groups: planned groups.
        attributes: attribute edits of the plan.
        folds: attention scales of the plan.

    Raises:
        UnsupportedError: a tensor, position or attribute of the plan does not exist in this model.
    """
    for edit in attributes:
        _checked_edit(model, edit)
    tensors = named_tensors(model)
    _removed_by_tensor(tensors, groups)
    _fold_factors(tensors, groups, folds)


#: Positions that leave a dimension, its size, and the device of its tensor.
_Cut = tuple[tuple[int, ...], int, torch.device]


def _removed_by_tensor(
    tensors: Mapping[str, Tensor], groups: Sequence[PlannedGroup]
) -> dict[int, dict[int, tuple[int, ...]]]:
    """By id of the tensor: dimension → positions that leave, ascending; aliases of one tensor are joined."""
    removed: dict[int, dict[int, tuple[int, ...]]] = {}
    for name, dims in removed_positions(tuple(groups)).items():
        tensor = tensor_at(tensors, name)
        for dim, positions in dims.items():
            if not 0 <= dim < tensor.dim() or positions[-1] >= tensor.shape[dim] or positions[0] < 0:
                raise UnsupportedError(
                    f"{name} has shape {tuple(tensor.shape)}: the plan removes positions {positions[0]} to "
                    f"{positions[-1]} of dimension {dim}, which it does not have.",
                    hint="The plan belongs to another model.",
                )
            own = removed.setdefault(id(tensor), {})
            own[dim] = tuple(sorted({*own[dim], *positions})) if dim in own else positions
    return removed


def _fold_factors(
    tensors: Mapping[str, Tensor], groups: Sequence[PlannedGroup], folds: Sequence[ScaleFold]
) -> dict[int, list[tuple[int, Tensor]]]:
    """By id of the tensor: dimensions, each with the float64 factor of every dense position."""
    share = {group.name: math.sqrt(len(group.keep) / group.width) for group in groups if group.is_cut}
    factors: dict[int, list[tuple[int, Tensor]]] = {}
    for fold in folds:
        if fold.group not in share:
            continue
        tensor = tensor_at(tensors, fold.tensor)
        if not 0 <= fold.dim < tensor.dim() or not all(0 <= at < tensor.shape[fold.dim] for at in fold.positions):
            raise UnsupportedError(
                f"{fold.tensor} has shape {tuple(tensor.shape)}: the attention scale of {fold.group} does not fit "
                f"dimension {fold.dim}."
            )
        factor = torch.ones(tensor.shape[fold.dim], dtype=torch.float64)
        factor[list(fold.positions)] = share[fold.group]
        factors.setdefault(id(tensor), []).append((fold.dim, factor))
    return factors


def _cut_tensor(
    name: str,
    tensor: Tensor,
    dims: Mapping[int, tuple[int, ...]],
    factors: Sequence[tuple[int, Tensor]],
    known: dict[_Cut, Tensor],
) -> Tensor:
    """The values scaled, then without the removed positions, in memory of their own.

    Args:
        name: name of the tensor, for the message.
        tensor: tensor as it is in the dense model.
        dims: dimension → positions to remove.
        factors: dimensions, each with a float64 factor for every dense position.
        known: kept positions of the cuts met before, filled here: one group runs through many tensors.
    """
    values = tensor.detach()
    for dim, factor in factors:
        shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
        values = (values.double() * factor.to(tensor.device).view(shape)).to(tensor.dtype)
    for dim, gone in sorted(dims.items()):  # the first dimension first: that moves whole rows, the next one less
        cut = (gone, tensor.shape[dim], tensor.device)
        if cut not in known:
            stays = torch.ones(tensor.shape[dim], dtype=torch.bool)
            stays[list(gone)] = False
            known[cut] = stays.nonzero().flatten().to(tensor.device)
        if not len(known[cut]):
            raise UnsupportedError(f"{name} {tuple(tensor.shape)}: nothing of dimension {dim} would be left.")
        values = values.index_select(dim, known[cut])
    return values


# ---------------------------------------------------------------------------------------------- attributes


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """An attribute, or one item inside it, and the value it takes."""

    owner: Any
    key: Any
    value: Any

    def apply(self) -> None:
        """Give the attribute or item its value."""
        if isinstance(self.owner, dict | list):
            self.owner[self.key] = self.value
        else:
            setattr(self.owner, self.key, self.value)


def _checked_edit(model: nn.Module, edit: AttributeEdit) -> _Setting:
    """The setting that makes ``edit``, its value in the container type found there."""
    place = tensor_name(edit.module, edit.name)
    try:
        owner: Any = model.get_submodule(edit.module)
        *path, last = edit.name.split(".")
        for key in path:
            owner = _item(owner, key)
        current = _item(owner, last)
    except (AttributeError, KeyError, IndexError, ValueError):
        raise UnsupportedError(
            f"The model has no attribute {place!r}.", hint="The plan belongs to another model."
        ) from None
    if plain_value(current) != plain_value(edit.before):
        raise UnsupportedError(
            f"Attribute {place} is {current!r}, but the plan was made for {edit.before!r}.",
            hint="The plan belongs to another model.",
        )
    return _Setting(
        owner=owner, key=int(last) if isinstance(owner, list) else last, value=as_type_of(current, edit.after)
    )


def _item(owner: Any, key: str) -> Any:
    """One step of a dotted attribute path: list index, dict key or attribute."""
    if isinstance(owner, list):
        return owner[int(key)]
    return owner[key] if isinstance(owner, dict) else getattr(owner, key)


def _follow_weight_(module: nn.Module) -> None:
    """Let a standard layer's record of its own sizes agree with its weight (``in_features``, ``num_features`` …).

    No forward pass needs most of these, so no dependency trace can find them; what prints the layer does.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    sizes = weight.shape
    match module:
        case nn.Linear():
            module.out_features, module.in_features = sizes
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            module.out_channels, module.in_channels = sizes[0], sizes[1] * module.groups
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            module.in_channels, module.out_channels = sizes[0], sizes[1] * module.groups
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d() | nn.SyncBatchNorm():
            module.num_features = sizes[0]
        case nn.GroupNorm():
            module.num_channels = sizes[0]
        case nn.LayerNorm():
            module.normalized_shape = tuple(sizes)
        case _:
            pass


def cut(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model`` without the channels that the plan removes; ``model`` stays as it is.

    Raises:
        UnsupportedError: the plan does not fit the model (see ``cut_``).
    """
    smaller = copy.deepcopy(model)
    cut_(smaller, groups=plan.groups, attributes=plan.attributes, folds=plan.folds)
    return smaller
