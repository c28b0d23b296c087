"""Operators where the index matters: lookups, shifts, orderings, new tensors."""

from __future__ import annotations

import torch

from prunecli.graph.axes.record import Call, Record
from prunecli.graph.axes.rules.registry import POSITIONS, opaque, rule, unrelated, wrap
from prunecli.graph.axes.terms import Atom, find, freeze, unify


@rule("index")
def _index(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    at = [d for d, index in enumerate(call.args[1]) if index is not None]
    indices = [call.args[1][d] for d in at]
    reason = f"{record.place} looks entries of it up by index"
    masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
    if masks or at != list(range(at[0], at[-1] + 1)):
        record.freeze(value.dims, reason)
        record.put(out, unrelated(out, reason), silent=False)
        return
    record.freeze([value.dims[d] for d in at], reason)
    shape = torch.broadcast_shapes(*(index.shape for index in indices))
    middle = [Atom(size, reason) for size in shape]
    first, last = at[0], at[-1] + 1
    record.put(
        out,
        [*value.dims[:first], *middle, *value.dims[last:]],
        [*value.silent[:first], *[False] * len(middle), *value.silent[last:]],
    )


@rule("index_select")
def _index_select(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    at = call.args[1] % len(value.dims)
    reason = f"{record.place} looks entries of it up by index"
    freeze(value.dims[at], reason)
    record.put(out, [*value.dims[:at], Atom(out.shape[at], reason), *value.dims[at + 1 :]], value.silent)


@rule("gather")
def _gather(record: Record, call: Call) -> None:
    """``out[i][j] = input[index[i][j]][j]`` along dimension 0: the other dimensions are those of both."""
    source, at, index = call.args[:3]
    value, places = record.value(source), record.dims(index)
    at %= max(source.dim(), 1)
    for d, (own, place) in enumerate(zip(value.dims, places, strict=True)):
        if d == at:
            record.freeze([own, place], f"{record.place} looks entries of it up by index")
        elif source.shape[d] == index.shape[d]:
            unify(own, place)
        else:
            record.freeze([own, place], f"{record.place} looks up only its first entries")
    record.put(call.out, places, [flag and d != at for d, flag in enumerate(value.silent)])


@rule("embedding")
def _embedding(record: Record, call: Call) -> None:
    table, indices = call.args[:2]
    value = record.value(table)
    freeze(value.dims[0], f"it counts the entries of the table looked up in {record.place}")
    record.weigh(table, produced=[1], contracted=[])
    record.put(call.out, [*record.dims(indices), value.dims[1]], [*[False] * indices.dim(), value.silent[1]])


@rule("roll", "flip")
def _roll(record: Record, call: Call) -> None:
    value = record.value(call.args[0])
    moved = call.get(2, "dims", ()) if call.name == "roll" else call.args[1]
    record.freeze([value.dims[d] for d in wrap(moved, len(value.dims))], POSITIONS)
    record.put(call.out, value.dims, value.silent)


@rule("as_strided_")
def _restride(record: Record, call: Call) -> None:
    """Only accepted as the new stride of a tensor with one long axis: entries stay where they are."""
    out, strides = call.out, call.args[2]
    long = [stride for size, stride in zip(out.shape, strides, strict=True) if size != 1]
    if [find(dim).size for dim in record.dims(out)] == list(call.args[1]) and long in ([], [1]):
        record.put(out, record.dims(out), record.value(out).silent)
    else:
        opaque(record, call)


@rule("sort", "topk", "cumsum", "cumprod", "argsort", "triu", "tril")
def _ordered(record: Record, call: Call) -> None:
    value = record.value(call.args[0])
    record.freeze(value.dims, POSITIONS)
    for out in call.outputs:
        same = list(out.shape) == list(call.args[0].shape)
        record.put(out, value.dims if same else unrelated(out, POSITIONS), silent=False)


@rule("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full")
def _constant(record: Record, call: Call) -> None:
    """A constant along all its axes: sizes that come from attributes or shapes make it as cuttable as these."""
    out = call.out
    name, args, kwargs = record.request
    own = args[1:] if name.startswith("new_") else args
    asked = kwargs.get("size", kwargs.get("shape"))
    if asked is None:
        asked = own[0] if own and isinstance(own[0], list | tuple) else own
    fits = name == call.name and len(asked) == out.dim()
    sizes = list(asked) if fits else list(out.shape)
    record.put(out, [record.sized(size) for size in sizes], "zeros" in call.name)


@rule("arange", "linspace", "eye", "rand", "randn", "scalar_tensor", "normal", "randint", "randperm")
def _by_position(record: Record, call: Call) -> None:
    for out in call.outputs:
        record.put(out, unrelated(out, POSITIONS), silent=False)


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "fill_", "zero_")
def _filled_like(record: Record, call: Call) -> None:
    zero = call.name in {"zeros_like", "zero_"} or (call.name in {"full_like", "fill_"} and call.get(1, "value") == 0)
    record.put(call.out, record.dims(call.args[0]), zero)
