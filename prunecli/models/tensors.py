"""Every tensor of a model, wherever it lies: found by name, replaced in place, compared by digest.

Each place that holds a tensor is a *slot* with a dotted name: ``blocks.0.attn.qkv.weight`` for parameters, buffers and
plain tensor attributes, ``stage.0.cache[cpu]`` for a tensor inside a dict or list attribute. Cutting and loading both
replace the tensors of slots, so that shared tensors stay shared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from prunecli.errors import UnsupportedError
from prunecli.values.groups import tensor_name


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256, as hex digits, over the tensors' names, types, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# What nn.Module itself keeps in its __dict__ (hooks, registries, the training flag), and where weights come from:
# neither is part of a model's structure.
_NOT_STRUCTURE = frozenset(vars(nn.Module())) | {"pretrained_cfg", "default_cfg", "_model_args"}


# ---------------------------------------------------------------------------------------------- slots


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One place that holds a tensor: attribute ``key`` of a module, or item ``key`` of a dict or list attribute."""

    name: str
    owner: nn.Module | dict[Any, Any] | list[Any]
    key: Any
    tensor: Tensor

    def put(self, tensor: Tensor) -> None:
        """Let the place hold ``tensor``."""
        if isinstance(self.owner, nn.Module):
            setattr(self.owner, self.key, tensor)
        else:
            self.owner[self.key] = tensor


def own_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's Python attributes without those of nn.Module."""
    return ((name, value) for name, value in vars(module).items() if name not in _NOT_STRUCTURE)


def slots(model: nn.Module) -> Iterator[Slot]:
    """Every slot of every module, shared ones under each of their names."""
    for path, module in model.named_modules(remove_duplicate=False):
        registered = chain(
            module.named_parameters(recurse=False, remove_duplicate=False),
            module.named_buffers(recurse=False, remove_duplicate=False),
        )
        for key, tensor in registered:
            yield Slot(name=tensor_name(path, key), owner=module, key=key, tensor=tensor)
        for key, value in own_attributes(module):
            if isinstance(value, Tensor):
                yield Slot(name=tensor_name(path, key), owner=module, key=key, tensor=value)
            elif isinstance(value, dict | list):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for item, tensor in items:
                    if isinstance(tensor, Tensor):
                        yield Slot(name=tensor_name(path, f"{key}[{item}]"), owner=value, key=item, tensor=tensor)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name → tensor for parameters, buffers (persistent or not) and tensor attributes.

    A shared tensor stands under each of its names.
    """
    return {slot.name: slot.tensor for slot in slots(model)}


def clear_caches_(model: nn.Module, *, keep: frozenset[str] = frozenset()) -> list[str]:
    """Empty the dict attributes that hold nothing but tensors, in place.

    What a forward pass stored there (levit's ``attention_bias_cache``) is derived from parameters, is wrong once they
    are cut, and fills itself again.

    Args:
        model: any module.
        keep: names of tensors whose dicts are left alone (those a plan cuts).

    Returns:
        Names of the attributes that were emptied.
    """
    cleared = []
    for path, module in model.named_modules():
        for key, value in own_attributes(module):
            if not isinstance(value, dict) or not value:
                continue
            derived = all(isinstance(item, Tensor) and not isinstance(item, nn.Parameter) for item in value.values())
            if derived and keep.isdisjoint(tensor_name(path, f"{key}[{item}]") for item in value):
                value.clear()
                cleared.append(tensor_name(path, key))
    return cleared


def map_tensors_(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Apply ``change`` to the values of every tensor that ``named_tensors`` lists, in place; to a shared one once."""
    new: dict[int, Tensor] = {}
    for slot in slots(model):
        if id(slot.tensor) not in new:
            new[id(slot.tensor)] = like(slot.tensor, change(slot.tensor.detach()))
    replace_(model, new)


def replace_(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Put ``new[id(old)]`` wherever ``old`` is held, in place, so that shared tensors stay shared."""
    for slot in list(slots(model)):
        tensor = new.get(id(slot.tensor))
        if tensor is not None:
            slot.put(tensor)


def like(old: Tensor, values: Tensor) -> Tensor:
    """``values`` as a tensor of the kind of ``old``: parameter or not, requires_grad, memory format, own attributes."""
    for layout in (torch.channels_last, torch.channels_last_3d):
        suits = old.dim() == (4 if layout is torch.channels_last else 5)
        if suits and old.is_contiguous(memory_format=layout) and not old.is_contiguous():
            values = values.contiguous(memory_format=layout)
    values = values.detach()
    if isinstance(old, nn.Parameter):
        values = nn.Parameter(values, requires_grad=old.requires_grad)
    else:
        values.requires_grad_(old.requires_grad)
    vars(values).update(vars(old))  # attributes that other libraries set on a tensor
    return values


def tensor_at(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of this name.

    Raises:
        UnsupportedError: the model has none.
    """
    if name not in tensors:
        raise UnsupportedError(f"The model has no tensor {name!r}.", hint="The plan belongs to another model.")
    return tensors[name]
