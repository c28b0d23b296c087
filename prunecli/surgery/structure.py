"""The structure of a cut model: how it differs from the plain one, and a plain one given that shape and its values.

A loader calls `shape_` and then `fill_` on a freshly built module. As cutting does, they replace the tensors of slots
(``prunecli.models.tensors``) and set attributes, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunecli.errors import UnsupportedError
from prunecli.models.tensors import clear_caches_, like, named_tensors, own_attributes, replace_, slots, tensor_at
from prunecli.values.plan import Structure

_ABSENT = object()


# ---------------------------------------------------------------------------------------------- structure


def structure_of(plain: nn.Module, pruned: nn.Module, *, whole: bool = False) -> Structure:
    """What differs between two modules of one architecture: tensor shapes, and attributes that JSON can hold.

    Args:
        plain: module as a loader builds it again.
        pruned: module as it is to be after loading.
        whole: ``True`` to name all tensors outside the state_dict as ``extra``, not only those whose shape differs: for
            a module whose builder may compute other values the next time.

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
    # A forward pass may have put tensors into containers; the other module need not have had one.
    cached = {slot.name for slot in slots(plain) if not isinstance(slot.owner, nn.Module)}
    missing = sorted(before.keys() - after.keys() - cached)
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

    Args:
        plain: module as its builder makes it.
        structure: difference to make, as `structure_of` found it.

    Raises:
        UnsupportedError: a recorded module, attribute or tensor does not exist here.
    """
    modules = dict(plain.named_modules(remove_duplicate=False))
    for path, changed in structure.attributes.items():
        if path not in modules:
            raise UnsupportedError(f"The plain model has no module {path!r}.")
        for name, value in changed.items():
            setattr(modules[path], name, as_type_of(getattr(modules[path], name, None), value))
    clear_caches_(plain, keep=frozenset(structure.tensors))
    tensors = named_tensors(plain)
    new = {}
    for name, shape in structure.tensors.items():
        old = tensor_at(tensors, name)
        if old.dim() != len(shape):
            raise UnsupportedError(f"{name} has shape {tuple(old.shape)} here and {tuple(shape)} in the structure.")
        new[id(old)] = like(old, torch.empty(shape, dtype=old.dtype, device="meta"))
    replace_(plain, new)


def fill_(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put values into every named tensor, in place; shared tensors stay shared.

    Args:
        model: module with the shapes of the values; a meta tensor moves to the device of its values.
        values: name → tensor, for all names of the ``state_dict`` and ``Structure.extra``; of a shared tensor any one
            of its names.

    Raises:
        UnsupportedError: an unknown name, a wrong shape or dtype, a tensor of the state_dict that is not given, or
            any tensor that is still without values afterwards.
    """
    tensors = named_tensors(model)
    new = {}
    for name, value in values.items():
        old = tensor_at(tensors, name)
        if old.shape != value.shape or old.dtype != value.dtype:
            raise UnsupportedError(
                f"{name} is {tuple(value.shape)} {value.dtype} in the file, "
                f"the model expects {tuple(old.shape)} {old.dtype}."
            )
        new[id(old)] = like(old, value if old.is_meta else value.to(old.device))
    missing = [name for name in model.state_dict(keep_vars=True) if name in tensors and id(tensors[name]) not in new]
    if missing:
        raise UnsupportedError(f"{len(missing)} tensors of the model are not in the file, the first is {missing[0]}.")
    replace_(model, new)
    empty = [name for name, tensor in named_tensors(model).items() if tensor.is_meta]
    if empty:
        raise UnsupportedError(f"{len(empty)} tensors have no values, the first is {empty[0]}.")


def _class_name(module: nn.Module) -> tuple[str, str]:
    """Module and name of the class: one made inside a function, as torch's parametrized ones, is new each time."""
    return type(module).__module__, type(module).__qualname__


def _changed_attributes(plain: nn.Module, pruned: nn.Module) -> dict[str, Any]:
    """Attributes of ``pruned`` that JSON can hold and that differ in ``plain``, as JSON values."""
    before = dict(own_attributes(plain))
    changed = {}
    for name, value in own_attributes(pruned):
        after = plain_value(value)
        if after is not _ABSENT and (name not in before or not _same(plain_value(before[name]), after)):
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


def plain_value(value: Any) -> Any:
    """A value as JSON would bring it back (tuples as lists, keys as text), or ``_ABSENT`` where JSON cannot hold it."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _ABSENT
    if isinstance(value, list | tuple):
        items = [plain_value(item) for item in value]
        return _ABSENT if any(item is _ABSENT for item in items) else items
    if isinstance(value, dict):
        pairs = {str(key): plain_value(item) for key, item in value.items()}
        held = len(pairs) == len(value) and not any(item is _ABSENT for item in pairs.values())
        return pairs if held else _ABSENT
    return _ABSENT


def as_type_of(template: Any, value: Any) -> Any:
    """``value``, as JSON brought it back, in the container types of ``template``.

    Items that the template does not have follow its last item.
    """
    if isinstance(value, list | tuple):
        # The recorded list may be longer than the plain model's: further items take the types of its last one.
        models = list(template) if isinstance(template, list | tuple) else []
        filled = models + [models[-1] if models else None] * (len(value) - len(models))
        items = [as_type_of(model, item) for model, item in zip(filled, value, strict=False)]
        if isinstance(template, tuple):
            # a named tuple takes its items one by one, any other tuple as one iterable
            return type(template)(*items) if hasattr(template, "_fields") else type(template)(items)
        return items if isinstance(template, list) else type(value)(items)
    if isinstance(value, Mapping):
        # JSON knows text keys only: "0" is the template's 0
        names = {str(key): key for key in template} if isinstance(template, Mapping) else {}
        get = template.get if isinstance(template, Mapping) else lambda _: None
        return {names.get(key, key): as_type_of(get(names.get(key, key)), item) for key, item in value.items()}
    return value
