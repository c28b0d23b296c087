"""Default-scale attention: keeping ``1 / sqrt(head width)`` true when the head width is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from prunecli.axes.folds import Rows, UnknownQueryError, query_rows, reads_any
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
        axis = _scaling_axis(scale.width)
        where = f"the attention in module {scale.module!r} divides by its root"
        if axis is None:
            freeze(scale.width, f"{where} and the head width has several parts")
            continue
        try:
            found.append(FoldableScale(axis=axis, rows=_rows(record, scale)))
        except UnknownQueryError as unknown:
            freeze(scale.width, f"{where} and {unknown}")
    return tuple(dict.fromkeys(found))


def _rows(record: Record, scale: DefaultScale) -> tuple[Rows, ...]:
    """The rows behind the queries or, where these follow no rows, behind the keys.

    Raises:
        UnknownQueryError: neither will do; says why the queries do not.
    """
    query, key = _rows_or_error(record, scale.query), _rows_or_error(record, scale.key)
    if isinstance(query, UnknownQueryError):
        if isinstance(key, UnknownQueryError) or _takes_part(record, key, scale.query):
            raise query
        return tuple(key)
    if _takes_part(record, query, scale.key) if isinstance(key, UnknownQueryError) else _overlap(query, key):
        raise UnknownQueryError("queries and keys share weights")
    return tuple(query)


def _takes_part(record: Record, rows: Iterable[Rows], tensor: Tensor) -> bool:
    return reads_any(record, tensor, {part.tensor for part in rows})


def _scaling_axis(width: Atom) -> Atom | None:
    """The one axis that a head width is proportional to; None where there is none."""
    free = {leaf for leaf in leaves(width) if leaf.reason is None}
    axis = next(iter(free), None)
    return axis if axis is not None and len(free) == 1 and _is_multiple(width, axis) else None


def _is_multiple(term: Atom, axis: Atom) -> bool:
    """Whether a term has a fixed number of entries for each entry of ``axis`` (rotated halves: ``[axis | axis]``)."""
    term = find(term)
    if term.form == "concat":
        return all(_is_multiple(kid, axis) for kid in term.kids)
    own = [factor for factor in factors(term) if axis in leaves(factor)]
    return len(own) == 1 and (own[0] is axis or (own[0].form == "concat" and _is_multiple(own[0], axis)))


def _rows_or_error(record: Record, tensor: Tensor) -> list[Rows] | UnknownQueryError:
    try:
        return query_rows(record, tensor)
    except UnknownQueryError as unknown:
        return unknown


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
