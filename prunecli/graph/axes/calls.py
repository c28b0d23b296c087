"""Sizes in Python-level torch calls: which int argument sizes which dimension.

The aten operators below see plain numbers. Here, one level up, the numbers still know their origin: each int that
sizes a dimension becomes an equation (or, when it is a literal, freezes the dimension). Ints with no handler here are
pinned: whatever attribute or extent they came from must keep its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunecli.graph.axes.ints import TracedInt, untraced
from prunecli.graph.axes.record import Record
from prunecli.graph.axes.rules.registry import rows, words
from prunecli.graph.axes.terms import Atom, MisfitError, blocks, find, is_frozen

Args = Sequence[Any]
Kwargs = Mapping[str, Any]
Handler = Callable[[Record, Args, Kwargs, Any], None]

#: Calls whose ints are read by the rule of their operator, from `Record.request`.
READ_BY_RULE = words(
    "pad expand zeros ones empty full new_zeros new_ones new_empty new_full",
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
)


def _argument(args: Args, kwargs: Kwargs, position: int, *names: str) -> Any:
    """An argument by its name, if it is given by one of ``names``, else by position; ``None`` without."""
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[position] if len(args) > position else None


def _view(record: Record, args: Args, kwargs: Kwargs, out: Any) -> None:
    sizes = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else args[1:]
    sizes = sizes or kwargs.get("shape", kwargs.get("size", ()))
    if sizes and isinstance(sizes[0], torch.dtype):
        return
    for size, dim in zip(sizes, record.peek(out).dims, strict=True):
        _equate(record, size, [dim])


def _equate(record: Record, size: int, parts: Sequence[Atom]) -> None:
    """An equation, unless the dimension has size 1: that carries no axis (batch 1 was traced)."""
    if sum(find(part).size for part in parts) != 1:
        record.equate(size, parts)


def _view_as(record: Record, args: Args, _kwargs: Kwargs, out: Any) -> None:
    record.same_size(out, args[1])


def _unflatten(record: Record, args: Args, kwargs: Kwargs, out: Any) -> None:
    at = untraced(_argument(args, kwargs, 1, "dim")) % args[0].dim()
    for i, size in enumerate(_argument(args, kwargs, 2, "sizes", "unflattened_size")):
        _equate(record, size, [record.peek(out).dims[at + i]])


def _split(record: Record, args: Args, kwargs: Kwargs, out: Any) -> None:
    sizes = _argument(args, kwargs, 1, "split_size_or_sections", "split_size", "split_sizes")
    at = untraced(_argument(args, kwargs, 2, "dim") or 0)
    parts = [record.peek(t).dims[at] for t in out]
    if isinstance(sizes, list | tuple):
        for size, part in zip(sizes, parts, strict=True):
            _equate(record, size, [part])
        return
    if len({find(part).size for part in parts}) > 1:
        record.freeze(parts, f"{record.place} splits it in unequal pieces by one number")
    for part in parts:
        _equate(record, sizes, [part])


def _chunk(record: Record, args: Args, kwargs: Kwargs, out: Any) -> None:
    at = untraced(_argument(args, kwargs, 2, "dim") or 0)
    parts = [record.peek(t).dims[at] for t in out]
    if len({find(part).size for part in parts}) > 1:
        record.freeze(parts, f"{record.place} splits it in unequal chunks")
        return
    for other in out[1:]:
        record.equal_sizes(parts[0], record.peek(other).dims[at])


def _narrow(record: Record, args: Args, kwargs: Kwargs, _out: Any) -> None:
    dim = untraced(_argument(args, kwargs, 1, "dim"))
    start, length = _argument(args, kwargs, 2, "start"), _argument(args, kwargs, 3, "length")
    _size_slice(record, args[0], dim, start, start + length)


def _getitem(record: Record, args: Args, _kwargs: Kwargs, _out: Any) -> None:
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(isinstance(i, Tensor | list) for i in index):
        return
    taken = sum(1 for i in index if i is not None and i is not Ellipsis)
    at = 0
    for i in index:
        if i is Ellipsis:
            at += args[0].dim() - taken
        elif isinstance(i, slice):
            if i.step in {None, 1}:
                _size_slice(record, args[0], at, i.start, i.stop)
            at += 1
        elif i is not None:
            untraced(i, pin=True)
            at += 1


def _size_slice(record: Record, source: Tensor, at: int, start: int | None, stop: int | None) -> None:
    """Read ``source[start:stop]`` along one dimension: a number sizes the blocks before it, a negative one behind."""
    dim = record.peek(source).dims[at]
    total = find(dim).size
    low, high = untraced(start) or 0, total if stop is None else untraced(stop)
    if (low == 0 and high >= total and not isinstance(stop, TracedInt)) or is_frozen(dim):
        return
    low, high = (max(end + total, 0) if end < 0 else min(end, total) for end in (low, high))
    try:
        before, inside, after = blocks(dim, [low, max(high - low, 0), total - max(low, high)])
    except MisfitError:
        return  # the operator's rule has frozen it
    if start is not None and low > 0:
        _size_end(record, start, [before], [inside, after])
    if stop is not None:
        _size_end(record, stop, [before, inside], [after])


def _size_end(record: Record, end: int, front: Sequence[Atom], back: Sequence[Atom]) -> None:
    """Equate an end of a slice with the blocks it counts, from the front or, where negative, from the back."""
    if untraced(end) < 0:
        record.equate(-end, back)
    else:
        record.equate(end, [part for part in front if find(part).size])


def _norm(record: Record, args: Args, kwargs: Kwargs, _out: Any) -> None:
    shape = _argument(args, kwargs, 1, "normalized_shape")
    for size, dim in zip(shape, record.dims(args[0])[-len(shape) :], strict=True):
        _equate(record, size, [dim])


def _group_norm(record: Record, args: Args, kwargs: Kwargs, out: Any) -> None:
    groups = _argument(args, kwargs, 1, "num_groups")
    _equate(record, groups, [rows(record, record.dims(out)[1], untraced(groups))[0]])


HANDLERS: dict[str, Handler] = {
    "view": _view,
    "reshape": _view,
    "view_as": _view_as,
    "reshape_as": _view_as,
    "expand_as": _view_as,
    "unflatten": _unflatten,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _chunk,
    "narrow": _narrow,
    "__getitem__": _getitem,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "group_norm": _group_norm,
}

#: Functions written in Python whose body calls operators with sizes it takes from shapes alone.
TRANSPARENT = words(
    "linear einsum embedding glu prelu threshold batch_norm instance_norm normalize norm",
    "relu relu6 gelu silu selu elu celu rrelu mish leaky_relu hardswish hardsigmoid hardtanh hardshrink sigmoid tanh",
    "softplus softsign softshrink softmax softmin log_softmax gumbel_softmax logsigmoid tanhshrink",
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout",
    "interpolate upsample unfold fold grid_sample affine_grid lp_pool2d cdist cosine_similarity",
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool2d_with_indices",
    "max_pool1d max_pool2d max_pool2d_with_indices avg_pool2d boolean_dispatch fn",
    "meshgrid broadcast_tensors atleast_1d atleast_2d atleast_3d tensor_split unbind",
    "_assert",
)
