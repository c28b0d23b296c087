"""Surgery: make a module smaller, describe how it then differs from the plain one, and give a plain one that shape.

Cutting and loading share one path: every place of a module that holds a tensor is a *slot* with a dotted name, and both
replace the tensors of slots and set attributes, nothing else. No decision is taken here and no model family is known.

Names: ``blocks.0.attn.qkv.weight`` for parameters, buffers and plain tensor attributes; ``stage.0.cache[cpu]`` for a
tensor inside a dict or list attribute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from prunecli.errors import UnsupportedError
from prunecli.values.groups import AttributeEdit, ScaleFold
from prunecli.values.plan import PlannedGroup, Structure, removed_positions

# What nn.Module itself keeps in its __dict__ (hooks, registries, the training flag), and where weights come from:
# neither is part of a model's structure.
_NOT_STRUCTURE = frozenset(vars(nn.Module())) | {"pretrained_cfg", "default_cfg", "_model_args"}
_ABSENT = object()


# ---------------------------------------------------------------------------------------------- slots


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """One place that holds a tensor: attribute ``key`` of a module, or item ``key`` of a dict or list attribute."""

    name: str
    owner: nn.Module | dict[Any, Any] | list[Any]
    key: Any
    tensor: Tensor

    def put(self, tensor: Tensor) -> None:
        if isinstance(self.owner, nn.Module):
            setattr(self.owner, self.key, tensor)
        else:
            self.owner[self.key] = tensor


def _own_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's Python attributes without those of nn.Module."""
    return ((name, value) for name, value in vars(module).items() if name not in _NOT_STRUCTURE)


def _slots(model: nn.Module) -> Iterator[_Slot]:
    """Every slot of every module, shared ones under each of their names."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        registered = chain(
            module.named_parameters(recurse=False, remove_duplicate=False),
            module.named_buffers(recurse=False, remove_duplicate=False),
        )
        for key, tensor in registered:
            yield _Slot(name=prefix + key, owner=module, key=key, tensor=tensor)
        for key, value in _own_attributes(module):
            if isinstance(value, Tensor):
                yield _Slot(name=prefix + key, owner=module, key=key, tensor=value)
            elif isinstance(value, dict | list):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for item, tensor in items:
                    if isinstance(tensor, Tensor):
                        yield _Slot(name=f"{prefix}{key}[{item}]", owner=value, key=item, tensor=tensor)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the model by name: parameters, buffers (persistent or not) and tensor attributes.

    Shared ones stand under each of their names.
    """
    return {slot.name: slot.tensor for slot in _slots(model)}


def clear_caches_(model: nn.Module, *, keep: frozenset[str] = frozenset()) -> list[str]:
    """Empty the dict attributes that hold nothing but tensors: what a forward pass stored there (levit's
    ``attention_bias_cache``) is derived from parameters, is wrong once they are cut, and fills itself again.

    Args:
        model: changed in place.
        keep: names of tensors that are to be kept (those a plan cuts).

    Returns:
        Names of the attributes that were emptied.
    """
    cleared = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for key, value in _own_attributes(module):
            if not isinstance(value, dict) or not value:
                continue
            derived = all(isinstance(item, Tensor) and not isinstance(item, nn.Parameter) for item in value.values())
            if derived and keep.isdisjoint(f"{prefix}{key}[{item}]" for item in value):
                value.clear()
                cleared.append(prefix + key)
    return cleared


def map_tensors_(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Apply ``change`` to the values of every tensor ``named_tensors`` lists, in place, once to a shared one."""
    new: dict[int, Tensor] = {}
    for slot in _slots(model):
        if id(slot.tensor) not in new:
            new[id(slot.tensor)] = _like(slot.tensor, change(slot.tensor.detach()))
    _replace_(model, new)


def _replace_(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Put ``new[id(old)]`` wherever ``old`` is held, so that shared tensors stay shared."""
    for slot in list(_slots(model)):
        tensor = new.get(id(slot.tensor))
        if tensor is not None:
            slot.put(tensor)


def _like(old: Tensor, values: Tensor) -> Tensor:
    """``values`` as what ``old`` is: a parameter or a plain tensor, its requires_grad, memory format and marks."""
    for layout in (torch.channels_last, torch.channels_last_3d):
        suits = old.dim() == (4 if layout is torch.channels_last else 5)
        if suits and old.is_contiguous(memory_format=layout) and not old.is_contiguous():
            values = values.contiguous(memory_format=layout)
    values = values.detach()
    if isinstance(old, nn.Parameter):
        values = nn.Parameter(values, requires_grad=old.requires_grad)
    else:
        values.requires_grad_(old.requires_grad)
    vars(values).update(vars(old))
    return values


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
        model: on any device, meta included.
        groups: only their removed channels matter, uncut groups are ignored.
        attributes: set after the tensors; ``name`` may lead into a container (``feature_info.0.num_chs``).
        folds: of groups that are cut; others are ignored.

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
            new[id(tensor)] = _like(tensor, _cut_tensor(name, tensor, dims, factors, known))
    clear_caches_(model, keep=frozenset(m.tensor for group in groups for m in group.members))
    _replace_(model, new)
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
    """Raise UnsupportedError where ``cut_`` would refuse the plan for what it names; nothing is changed."""
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
        tensor = _tensor_at(tensors, name)
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
        tensor = _tensor_at(tensors, fold.tensor)
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
    """Scaled, then without the removed positions; a tensor of its own memory.

    ``known`` holds the kept positions of cuts met before: one group runs through many tensors.
    """
    values = tensor.detach()
    for dim, factor in factors:
        shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
        values = (values.double() * factor.to(tensor.device).view(shape)).to(tensor.dtype)
    for dim, gone in sorted(dims.items()):  # the first dimension first: that moves whole rows, the next one less
        cut = (gone, tensor.shape[dim], tensor.device)
        if cut not in known:
            known[cut] = _kept(*cut)
        if not len(known[cut]):
            raise UnsupportedError(f"{name} {tuple(tensor.shape)}: nothing of dimension {dim} would be left.")
        values = values.index_select(dim, known[cut])
    return values


def _kept(gone: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[list(gone)] = False
    return stays.nonzero().flatten().to(device)


def _tensor_at(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UnsupportedError(f"The model has no tensor {name!r}.", hint="The plan belongs to another model.")
    return tensors[name]


# ---------------------------------------------------------------------------------------------- attributes


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """An attribute, or one item inside it, and the value it takes."""

    owner: Any
    key: Any
    value: Any

    def apply(self) -> None:
        if isinstance(self.owner, dict | list):
            self.owner[self.key] = self.value
        else:
            setattr(self.owner, self.key, self.value)


def _checked_edit(model: nn.Module, edit: AttributeEdit) -> _Setting:
    """Where the edit lands; the value takes the container type found there."""
    place = f"{edit.module}.{edit.name}".lstrip(".")
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
    if _plain(current) != _plain(edit.before):
        raise UnsupportedError(
            f"Attribute {place} is {current!r}, but the plan was made for {edit.before!r}.",
            hint="The plan belongs to another model.",
        )
    return _Setting(owner=owner, key=int(last) if isinstance(owner, list) else last, value=_as(current, edit.after))


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


# ---------------------------------------------------------------------------------------------- structure


def structure_of(plain: nn.Module, pruned: nn.Module, *, whole: bool = False) -> Structure:
    """What differs between two modules of one architecture: tensor shapes, and attributes that JSON can hold.

    Args:
        plain: as it is built again for loading.
        pruned: as it is to be.
        whole: name all tensors outside the state_dict as ``extra``, not only those whose shape differs: for a module
            whose builder may compute them otherwise the next time.

    Raises:
        UnsupportedError: the two do not consist of the same modules and tensors; names the first difference.
    """
    theirs = dict(pruned.named_modules(remove_duplicate=False))
    attributes: dict[str, dict[str, Any]] = {}
    for path, module in plain.named_modules(remove_duplicate=False):
        other = theirs.pop(path, None)
        if other is None or _class_name(module) != _class_name(other):
            raise UnsupportedError(
                f"Module {path!r} is {type(module).__name__} in the plain model, {type(other).__name__} in the other."
            )
        changed = _changed_attributes(module, other)
        if changed:
            attributes[path] = changed
    if theirs:
        raise UnsupportedError(f"The plain model has no module {next(iter(theirs))!r}.")
    before, after = named_tensors(plain), named_tensors(pruned)
    missing = sorted(before.keys() - after.keys() - _cached(plain))
    if missing:
        raise UnsupportedError(f"The pruned model has no tensor {missing[0]!r}.")
    shapes = {n: tuple(t.shape) for n, t in after.items() if n in before and t.shape != before[n].shape}
    saved = pruned.state_dict().keys()
    extra = tuple(n for n in (after if whole else shapes) if n in before and n not in saved)
    return Structure(tensors=shapes, attributes=attributes, extra=extra)


def shape_(plain: nn.Module, structure: Structure) -> None:
    """Give a plain module the recorded shapes and attributes, in place.

    Tensors whose shape changes become meta tensors: they hold nothing until ``fill_`` (or ``load_state_dict`` with
    ``assign=True``) puts values there, and computing with them before that fails aloud.

    Raises:
        UnsupportedError: a recorded module, attribute or tensor does not exist here.
    """
    modules = dict(plain.named_modules(remove_duplicate=False))
    for path, changed in structure.attributes.items():
        if path not in modules:
            raise UnsupportedError(f"The plain model has no module {path!r}.")
        for name, value in changed.items():
            setattr(modules[path], name, _as(getattr(modules[path], name, None), value))
    clear_caches_(plain, keep=frozenset(structure.tensors))
    tensors = named_tensors(plain)
    new = {}
    for name, shape in structure.tensors.items():
        old = _tensor_at(tensors, name)
        if old.dim() != len(shape):
            raise UnsupportedError(f"{name} has shape {tuple(old.shape)} here and {tuple(shape)} in the structure.")
        new[id(old)] = _like(old, torch.empty(shape, dtype=old.dtype, device="meta"))
    _replace_(plain, new)


def fill_(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put values into every named tensor (``state_dict`` names and ``Structure.extra``), in place, sharing kept.

    A shared tensor may be given under any one of its names. A meta tensor is replaced on the device of its values.

    Raises:
        UnsupportedError: an unknown name, a wrong shape or dtype, a tensor of the state_dict that is not given, or
            any tensor that is still without values afterwards.
    """
    tensors = named_tensors(model)
    new = {}
    for name, value in values.items():
        old = _tensor_at(tensors, name)
        if old.shape != value.shape or old.dtype != value.dtype:
            raise UnsupportedError(
                f"{name} is {tuple(value.shape)} {value.dtype} in the file, "
                f"the model expects {tuple(old.shape)} {old.dtype}."
            )
        new[id(old)] = _like(old, value if old.is_meta else value.to(old.device))
    missing = [name for name in model.state_dict(keep_vars=True) if name in tensors and id(tensors[name]) not in new]
    if missing:
        raise UnsupportedError(f"{len(missing)} tensors of the model are not in the file, the first is {missing[0]}.")
    _replace_(model, new)
    empty = [name for name, tensor in named_tensors(model).items() if tensor.is_meta]
    if empty:
        raise UnsupportedError(f"{len(empty)} tensors have no values, the first is {empty[0]}.")


def _class_name(module: nn.Module) -> tuple[str, str]:
    """By name: a class that is made inside a function, as torch's parametrized ones are, is another one each time."""
    return type(module).__module__, type(module).__qualname__


def _cached(model: nn.Module) -> set[str]:
    """Names of tensors that sit in containers: a forward pass may have put them there, so they need no twin."""
    return {slot.name for slot in _slots(model) if not isinstance(slot.owner, nn.Module)}


def _changed_attributes(plain: nn.Module, pruned: nn.Module) -> dict[str, Any]:
    """Attributes of ``pruned`` that JSON can hold and that differ in ``plain``, as JSON values."""
    before = dict(_own_attributes(plain))
    changed = {}
    for name, value in _own_attributes(pruned):
        after = _plain(value)
        if after is not _ABSENT and (name not in before or not _same(_plain(before[name]), after)):
            changed[name] = after
    return changed


def _same(a: Any, b: Any) -> bool:
    """Equal in type and value all the way down, so that 1, 1.0 and True are three values."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


def _plain(value: Any) -> Any:
    """A value as JSON would bring it back (tuples as lists, keys as text), or ``_ABSENT`` where JSON cannot hold it."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _ABSENT
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return _ABSENT if any(item is _ABSENT for item in items) else items
    if isinstance(value, dict):
        pairs = {str(key): _plain(item) for key, item in value.items()}
        held = len(pairs) == len(value) and not any(item is _ABSENT for item in pairs.values())
        return pairs if held else _ABSENT
    return _ABSENT


def _as(template: Any, value: Any) -> Any:
    """``value`` in the container types of ``template``; items beyond the template's last follow its last."""
    if isinstance(value, list | tuple):
        models = list(template) if isinstance(template, list | tuple) else []
        filled = models + [models[-1] if models else None] * (len(value) - len(models))
        items = [_as(model, item) for model, item in zip(filled, value, strict=False)]
        if isinstance(template, tuple):
            return type(template)(*items) if hasattr(template, "_fields") else type(template)(items)
        return items if isinstance(template, list) else type(value)(items)
    if isinstance(value, Mapping):
        names = {str(key): key for key in template} if isinstance(template, Mapping) else {}
        get = template.get if isinstance(template, Mapping) else lambda _: None
        return {names.get(key, key): _as(get(names.get(key, key)), item) for key, item in value.items()}
    return value
