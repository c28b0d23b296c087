"""Operators that join and cut dimensions: cat, split, slices, padding."""

from __future__ import annotations

from collections.abc import Sequence

from prunecli.graph.axes.record import Call, Record
from prunecli.graph.axes.rules.entries import put_entries, put_entry
from prunecli.graph.axes.rules.registry import cut, rows, rule
from prunecli.graph.axes.terms import Atom, concat, freeze, is_frozen, unify


@rule("cat")
def _cat(record: Record, call: Call) -> None:
    out = call.out
    parts = [record.value(t) for t in call.args[0] if t.numel() or t.dim() == out.dim()]
    at = call.get(1, "dim", 0) % out.dim()
    dims, silent = [], []
    for d in range(out.dim()):
        if d == at:
            dims.append(concat(part.dims[d] for part in parts))
        else:
            for part in parts[1:]:
                unify(parts[0].dims[d], part.dims[d])
            dims.append(parts[0].dims[d])
        silent.append(all(part.silent[d] or is_frozen(part.dims[d]) for part in parts))
    record.put(out, dims, silent)


@rule("stack")
def _stack(record: Record, call: Call) -> None:
    parts = [record.value(t) for t in call.args[0]]
    for part in parts[1:]:
        for first, own in zip(parts[0].dims, part.dims, strict=True):
            unify(first, own)
    at = call.get(1, "dim", 0) % call.out.dim()
    dims = list(parts[0].dims)
    silent = [all(part.silent[d] for part in parts) for d in range(len(dims))]
    dims.insert(at, Atom(len(parts), f"{record.place} stacks tensors along it"))
    silent.insert(at, False)
    record.put(call.out, dims, silent)


@rule("split", "split_with_sizes", "unsafe_split", "split_with_sizes_copy", "chunk", "tensor_split")
def _split(record: Record, call: Call) -> None:
    value = record.peek(call.args[0])
    at = call.get(2, "dim", 0) % len(value.dims)
    if value.entries is not None and value.entries.over == at:
        start = 0
        for out in call.out:
            put_entries(record, value, out, start)
            start += out.shape[at]
        return
    value = record.value(call.args[0])
    parts = cut(record, value.dims[at], [t.shape[at] for t in call.out])
    for out, part in zip(call.out, parts, strict=True):
        record.put(out, [*value.dims[:at], part, *value.dims[at + 1 :]], value.silent)


@rule("slice")
def _slice(record: Record, call: Call) -> None:
    source, out = call.args[0], call.out
    value = record.peek(source)
    at = call.get(1, "dim", 0) % len(value.dims)
    total, length = source.shape[at], out.shape[at]
    start, step = call.get(2, "start") or 0, call.get(4, "step", 1)
    start = start + total if start < 0 else min(start, total)
    if length == total:
        record.put(out, value.dims, value.silent, entries=value.entries)
        return
    if value.entries is not None and value.entries.over == at and step == 1 and length:
        put_entries(record, value, out, start)
        return
    value = record.value(source)
    dim = value.dims[at]
    if step == 1:
        part = cut(record, dim, [start, length, total - start - length])[1]
    elif total % step == 0 and not is_frozen(dim):
        part, phase = rows(record, dim, total // step)
        freeze(phase, f"{record.place} takes every {step}th entry of it")
    else:
        freeze(dim, f"{record.place} takes every {step}th entry of it")
        part = Atom(length, f"{record.place} takes every {step}th entry of it")
    record.put(out, [*value.dims[:at], part, *value.dims[at + 1 :]], value.silent)


@rule("select")
def _select(record: Record, call: Call) -> None:
    size = call.args[0].shape[call.args[1]]
    _without(record, call, call.args[1], [call.args[2] % size])


@rule("unbind")
def _unbind(record: Record, call: Call) -> None:
    _without(record, call, call.get(1, "dim", 0), range(len(call.out)))


def _without(record: Record, call: Call, dim: int, picked: Sequence[int]) -> None:
    """Outputs without a dimension, each one entry of it."""
    value = record.peek(call.args[0])
    at = dim % len(value.dims)
    freeze(value.dims[at], f"{record.place} picks single entries of it")
    if value.entries is not None and value.entries.over == at:
        for out, index in zip(call.outputs, picked, strict=True):
            put_entry(record, value, out, index)
        return
    value = record.value(call.args[0])
    for out in call.outputs:
        record.put(out, [*value.dims[:at], *value.dims[at + 1 :]], [*value.silent[:at], *value.silent[at + 1 :]])


@rule("glu")
def _glu(record: Record, call: Call) -> None:
    value = record.value(call.args[0])
    at = call.get(1, "dim", -1) % len(value.dims)
    half = call.out.shape[at]
    first, second = cut(record, value.dims[at], [half, half])
    unify(first, second)
    record.put(call.out, [*value.dims[:at], first, *value.dims[at + 1 :]], value.silent)


@rule("constant_pad_nd")
def _pad(record: Record, call: Call) -> None:
    value = record.value(call.args[0])
    amounts, fill = call.args[1], call.get(2, "value", 0)
    name, args, kwargs = record.request
    asked = list(kwargs.get("pad", args[1] if len(args) > 1 else ())) if name == "pad" else []
    dims = list(value.dims)
    for i in range(len(amounts) // 2):
        at = len(dims) - 1 - i
        before, after = amounts[2 * i : 2 * i + 2]
        if before == after == 0:
            continue
        if before < 0 or after < 0:
            freeze(dims[at], f"{record.place} crops it")
            dims[at] = Atom(call.out.shape[at], f"{record.place} crops it")
            continue
        pair = asked[2 * i : 2 * i + 2] if len(asked) == len(amounts) else [before, after]
        dims[at] = concat([record.sized(pair[0]), dims[at], record.sized(pair[1])])
    zeros = fill is None or fill == 0
    record.put(call.out, dims, [zeros and flag for flag in value.silent])
