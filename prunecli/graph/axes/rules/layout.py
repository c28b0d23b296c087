"""Operators that only move entries: views, transpositions, broadcasts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from torch import Tensor

from prunecli.graph.axes.record import Call, Record, TensorAxes
from prunecli.graph.axes.rules.entries import put_view
from prunecli.graph.axes.rules.registry import flat_sizes, regroup, regrouped_silence, rule, unrelated, words, wrap
from prunecli.graph.axes.terms import Atom, MisfitError, product

ONE_LENGTH = "it is broadcast to a length that no module attribute gives"
#: Calls that broadcast one operand to the other, with whose axis it is then made one.
_BROADCASTING = words("matmul __matmul__ __rmatmul__ einsum normalize")


@rule("view", "_unsafe_view", "_reshape_alias", "reshape")
def _view(record: Record, call: Call) -> None:
    source, out = call.args[0], call.out
    with suppress(MisfitError):  # then all entries are one axis; if even that misfits, the reason is recorded below
        if put_view(record, source, out):
            return
    value = record.value(source)
    try:
        dims = regroup(value.dims, out.shape)
    except MisfitError as misfit:
        reason = f"{record.place} reshapes it where its parts do not line up ({misfit})"
        record.freeze(value.dims, reason)
        dims = unrelated(out, reason)
    record.put(out, dims, regrouped_silence(value, dims), origin=_viewed_origin(value, source, out))


def _viewed_origin(value: TensorAxes, source: Tensor, out: Tensor) -> tuple[str, tuple[int, ...]] | None:
    """The origin of a view that only drops size-1 dimensions at the end, as of a 1x1 kernel; ``None`` for others."""
    rank = min(source.dim(), out.dim())
    same = source.shape[:rank] == out.shape[:rank]
    if value.origin is None or not same or out.dim() > source.dim():
        return None
    return value.origin[0], value.origin[1][:rank]


def _reorder(record: Record, call: Call, order: Sequence[int]) -> None:
    value = record.peek(call.args[0])
    order = [d % len(value.dims) for d in order]
    origin = value.origin and (value.origin[0], tuple(value.origin[1][d] for d in order))
    entries = value.entries and value.entries.reordered(order)
    silent = [value.silent[d] for d in order]
    record.put(call.out, [value.dims[d] for d in order], silent, origin=origin, entries=entries)


@rule("t", "numpy_T")
def _t(record: Record, call: Call) -> None:
    _reorder(record, call, list(range(call.args[0].dim()))[::-1])


@rule("transpose", "swapaxes")
def _transpose(record: Record, call: Call) -> None:
    order = list(range(call.args[0].dim()))
    first, second = call.args[1:3]
    order[first], order[second] = order[second], order[first]
    _reorder(record, call, order)


@rule("permute")
def _permute(record: Record, call: Call) -> None:
    _reorder(record, call, call.args[1])


@rule("squeeze")
def _squeeze(record: Record, call: Call) -> None:
    shape = call.args[0].shape
    dropped = {d for d in wrap(call.get(1, "dim"), len(shape)) if shape[d] == 1}
    _reorder(record, call, [d for d in range(len(shape)) if d not in dropped])


@rule("unsqueeze")
def _unsqueeze(record: Record, call: Call) -> None:
    value = record.value(call.args[0])
    at = call.args[1] % (len(value.dims) + 1)
    record.put(call.out, [*value.dims[:at], Atom(1), *value.dims[at:]], [*value.silent[:at], False, *value.silent[at:]])


@rule("expand")
def _expand(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    new = out.dim() - len(value.dims)
    name, args, _ = record.request
    asked = flat_sizes(args[1:]) if name == "expand" else None
    dims, silent = [], []
    for d, size in enumerate(out.shape):
        if d >= new and call.args[0].shape[d - new] == size:
            dims.append(value.dims[d - new])
            silent.append(value.silent[d - new])
        else:
            dims.append(_broadcast_axis(record, size, asked[d] if asked and len(asked) == out.dim() else None))
            silent.append(False)
    record.put(out, dims, silent)


def _broadcast_axis(record: Record, size: int, asked: int | None) -> Atom:
    """The axis of a dimension that ``expand`` makes, with the size that the Python-level call gave, if it did."""
    if asked is not None:
        return record.sized(asked)
    return Atom(size) if record.request[0] in _BROADCASTING else Atom(size, ONE_LENGTH)


@rule("repeat")
def _repeat(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    new = out.dim() - len(value.dims)
    dims, silent = [], []
    for d, times in enumerate(call.args[1]):
        copies = Atom(times, f"{record.place} repeats the tensor along it")
        dims.append(product([copies, value.dims[d - new]]) if d >= new else copies)
        silent.append(d >= new and value.silent[d - new])
    record.put(out, dims, silent)


@rule("clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "lift_fresh_copy", "native_dropout")
def _same(record: Record, call: Call) -> None:
    value = record.peek(call.args[0])
    for out in call.outputs:
        record.put(out, value.dims, value.silent, origin=value.origin, entries=value.entries)
