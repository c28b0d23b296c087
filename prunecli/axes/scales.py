"""Default-scale attention: keeping ``1 / sqrt(head width)`` true when the head width is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from prunecli.axes.folds import Rows, UnknownQueryError, query_rows
from prunecli.axes.record import DefaultScale, Record
from prunecli.axes.solve import HeadScale
from prunecli.axes.terms import Atom, factors, find, freeze, is_frozen, leaves
from prunecli.groups import ScaleFold, Size


@dataclass(frozen=True, kw_only=True)
class FoldableScale:
    """An attention whose query can take up a change of its head width: the axis cut, and the rows that make it."""

    axis: Atom
    rows: tuple[Rows, ...]


def foldable_scales(record: Record) -> tuple[FoldableScale, ...]:
    """The default scales that can be kept true; the head widths of the others are frozen."""
    found = []
    for scale in record.default_scales:
        if is_frozen(scale.width):
            continue
        axis = _scaling_axis(scale)
        where = f"the attention in module {scale.module!r} divides by its root"
        if axis is None:
            freeze(scale.width, f"{where} and the head width has several parts")
            continue
        try:
            rows = query_rows(record, scale.query)
        except UnknownQueryError as unknown:
            freeze(scale.width, f"{where} and {unknown}")
            continue
        if _overlap(rows, _rows_if_known(record, scale.key)):
            freeze(scale.width, f"{where} and queries and keys share weights")
        else:
            found.append(FoldableScale(axis=axis, rows=tuple(rows)))
    return tuple(found)


def _scaling_axis(scale: DefaultScale) -> Atom | None:
    """The one axis whose cut changes a head width; None where none or no single factor does."""
    free = [leaf for leaf in leaves(scale.width) if leaf.reason is None]
    simple = all(factor.form == "leaf" for factor in factors(scale.width))
    return free[0] if len(free) == 1 and simple else None


def _rows_if_known(record: Record, tensor: Tensor) -> list[Rows]:
    try:
        return query_rows(record, tensor)
    except UnknownQueryError:
        return []


def _overlap(first: Iterable[Rows], second: Iterable[Rows]) -> bool:
    taken = {(rows.tensor, rows.dim): rows.positions for rows in second}
    return any(rows.positions & taken.get((rows.tensor, rows.dim), frozenset()) for rows in first)


def scale_folds(scales: Iterable[FoldableScale], names: Mapping[int, str]) -> tuple[ScaleFold, ...]:
    """The folds of the scales whose axis became a group; ``names`` by identity of the axis."""
    return tuple(
        ScaleFold(
            group=names[id(scale.axis)], tensor=rows.tensor, dim=rows.dim, positions=tuple(sorted(rows.positions))
        )
        for scale in scales
        if id(scale.axis) in names
        for rows in scale.rows
    )


def head_scales(record: Record, size_of: Callable[[Atom], Size]) -> list[HeadScale]:
    """Float attributes equal to ``head width ** -0.5`` of modules that let the attention operator compute it.

    Such a module uses its own number when the fused operator is switched off; both paths have to agree.
    """
    found = {}
    for scale in record.default_scales:
        root = find(scale.width).size ** -0.5
        for name, value in vars(record.model.get_submodule(scale.module)).items():
            if type(value) is float and value == root:
                found[scale.module, name] = HeadScale(
                    module=scale.module, name=name, before=value, size=size_of(scale.width)
                )
    return list(found.values())
