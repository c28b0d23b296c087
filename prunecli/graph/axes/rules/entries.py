"""Fused projections: queries, keys and values of one weight keep their own channels, only equally many.

A view that cuts a dimension by a number written in the code, ``[..., 3, heads, head_dim]``, makes each of the 3 entries
an axis of its own, held to one size by the view. The entries stay apart while dimensions are moved, joined or split
beside them, and part when one is picked. Whoever else looks at the tensor sees one term per dimension: the record then
makes the entries one axis, which is what they were before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from prunecli.graph.axes.record import Entries, Record, TensorAxes
from prunecli.graph.axes.rules.registry import flat_sizes, regroup, regrouped_silence
from prunecli.graph.axes.terms import Atom, blocks, concat, find, is_frozen, product, split_front, unify

#: More entries than this are no fused projection, but a grid or a table.
_MOST = 8

_Rows = list[dict[int, Atom]]
_Group = tuple[list[int], list[int]]


def put_view(record: Record, source: Tensor, out: Tensor) -> bool:
    """Record a view with its entries apart, if it has any.

    Args:
        record: the trace so far.
        source: the tensor that is viewed.
        out: the view.

    Returns:
        False where no entries are apart, with nothing recorded.

    Raises:
        MisfitError: the parts of a dimension do not line up with the new sizes.
    """
    value = record.peek(source)
    groups = _aligned(source.shape, out.shape)
    apart = (
        _split_entries(record, value, groups, out)
        if value.entries is None
        else _regroup_entries(value.entries, groups, out.shape)
    )
    if apart is None:
        return False
    over, found = apart
    rows = tuple(tuple(row[d] for d in range(out.dim())) for row in found)
    for row in rows[1:]:
        for first, own in zip(rows[0], row, strict=True):
            unify(first, own) if over is None else record.equal_sizes(first, own)
    silent = [all(flags) for flags in zip(*(regrouped_silence(value, row) for row in rows), strict=True)]
    record.put(out, rows[0], silent, entries=None if over is None else Entries(over=over, rows=rows))
    return True


def put_entry(record: Record, value: TensorAxes, out: Tensor, index: int) -> None:
    """Record one picked entry of a tensor whose entries are apart."""
    assert value.entries is not None
    over = value.entries.over
    row = value.entries.rows[index]
    record.put(out, [*row[:over], *row[over + 1 :]], [*value.silent[:over], *value.silent[over + 1 :]])


def put_entries(record: Record, value: TensorAxes, out: Tensor, start: int) -> None:
    """Record a slice of a tensor along the dimension whose entries are apart."""
    assert value.entries is not None
    over = value.entries.over
    length = out.shape[over]
    axis = Atom(length, f"{record.place} picks single entries of it")
    rows = tuple((*row[:over], axis, *row[over + 1 :]) for row in value.entries.rows[start : start + length])
    record.put(out, rows[0], value.silent, entries=Entries(over=over, rows=rows) if length > 1 else None)


def _aligned(old: Sequence[int], new: Sequence[int]) -> list[_Group]:
    """The dimensions of two shapes of one tensor in the smallest groups of equal size.

    Dimensions of size 1 go with their neighbour to the right, the last ones with the one to the left.
    """
    groups: list[_Group] = []
    ins: list[int] = []
    outs: list[int] = []
    at_old = at_new = 0
    while at_old < len(old) or at_new < len(new):
        size_in, size_out = math.prod(old[d] for d in ins), math.prod(new[d] for d in outs)
        if at_old < len(old) and (size_in <= size_out or at_new == len(new)):
            ins.append(at_old)
            at_old += 1
        else:
            outs.append(at_new)
            at_new += 1
        if math.prod(old[d] for d in ins) == math.prod(new[d] for d in outs) > 1:
            groups.append((ins, outs))
            ins, outs = [], []
    if groups:
        groups[-1][0].extend(ins)
        groups[-1][1].extend(outs)
    return groups


def _literals(record: Record, out: Tensor) -> set[int]:
    """The dimensions of a view whose sizes are numbers written in the code."""
    name, args, kwargs = record.request
    if name in {"view", "reshape"}:
        asked, first = flat_sizes(args[1:]) or kwargs.get("shape", kwargs.get("size", ())), 0
    elif name == "unflatten" and len(args) == 3:
        asked, first = args[2], int(args[1]) % args[0].dim()
    else:
        return set()
    plain = (first + i for i, size in enumerate(asked) if type(size) is int)
    return {d for d in plain if d < out.dim() and asked[d - first] == out.shape[d]}


def _split_entries(
    record: Record, value: TensorAxes, groups: Sequence[_Group], out: Tensor
) -> tuple[int, _Rows] | None:
    """The entries that this view makes along its first dimension of a literal size with others behind it.

    ``None`` where it makes none.
    """
    literals = _literals(record, out)
    for at, (ins, outs) in enumerate(groups):
        source = [value.dims[d] for d in ins if find(value.dims[d]).size > 1]
        long = [d for d in outs if out.shape[d] > 1]
        over = next((d for d in long[:-1] if d in literals and out.shape[d] <= _MOST), None)
        if over is None or len(source) != 1 or is_frozen(source[0]):
            continue
        rows = _split_dim(record, source[0], outs, over, out.shape)
        if all(find(row[d]) is find(rows[0][d]) for row in rows[1:] for d in outs):
            return None
        for others_in, others_out in (*groups[:at], *groups[at + 1 :]):
            _regroup_into(rows, [value.dims] * len(rows), others_in, others_out, out.shape)
        return over, rows
    return None


def _split_dim(record: Record, dim: Atom, outs: Sequence[int], over: int, shape: Sequence[int]) -> _Rows:
    """One dimension as ``before x entries x after``, where each entry has terms of its own for ``after``."""
    before, after = [d for d in outs if d < over], [d for d in outs if d > over]
    front, inside = split_front(dim, math.prod(shape[d] for d in before))
    count = shape[over]
    fixed = dict(zip(before, regroup([front], [shape[d] for d in before]), strict=True))
    fixed[over] = Atom(count, f"{record.place} cuts it into entries")
    parts = blocks(inside, [find(inside).size // count] * count)
    return [fixed | dict(zip(after, regroup([part], [shape[d] for d in after]), strict=True)) for part in parts]


def _regroup_into(
    rows: _Rows, sources: Sequence[Sequence[Atom]], ins: Sequence[int], outs: Sequence[int], shape: Sequence[int]
) -> None:
    """Add the dimensions ``outs`` to each row, regrouped from the dimensions ``ins`` of its source."""
    for row, source in zip(rows, sources, strict=True):
        row.update(zip(outs, regroup([source[d] for d in ins], [shape[d] for d in outs]), strict=True))


def _regroup_entries(
    entries: Entries, groups: Sequence[_Group], shape: Sequence[int]
) -> tuple[int | None, _Rows] | None:
    """The entries after another view; ``None`` where it cuts through the dimension along which they lie.

    The first result is the dimension along which they lie now, ``None`` where they were joined to consecutive blocks.
    """
    rows: _Rows = [{} for _ in entries.rows]
    over = None
    for ins, outs in groups:
        if entries.over not in ins:
            _regroup_into(rows, entries.rows, ins, outs, shape)
            continue
        long_in = [d for d in ins if find(entries.rows[0][d]).size > 1]
        long_out = [d for d in outs if shape[d] > 1]
        if len(long_out) != 1:
            return None
        if long_in == [entries.over]:
            over = long_out[0]
        joined = _join_dims(entries, long_in)
        for row in rows:
            row.update({d: joined if d == long_out[0] else Atom(1) for d in outs})
    return over, rows


def _join_dims(entries: Entries, dims: Sequence[int]) -> Atom:
    """Dimensions merged into one, with that of the entries: ``before x [first after | second after | …]``."""
    before, after = [d for d in dims if d < entries.over], [d for d in dims if d > entries.over]
    first = entries.rows[0]
    for row in entries.rows[1:]:
        for d in before:
            unify(first[d], row[d])
    inside = concat(product(row[d] for d in after) for row in entries.rows) if after else first[entries.over]
    return product([*(first[d] for d in before), inside])
