"""Default-scale attention: keeping the scale ``1 / sqrt(head width)`` of the dense net when the head width is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from prunecli.graph.axes.folds import Readers, Rows, Trail, UnknownQueryError, reads_any, trail
from prunecli.graph.axes.record import DefaultScale, Record
from prunecli.graph.axes.solve import HeadScale
from prunecli.graph.axes.terms import Atom, factors, find, freeze, is_frozen, leaves
from prunecli.values.groups import ScaleFold, Size


@dataclass(frozen=True, kw_only=True)
class FoldableScale:
    """An attention whose queries or keys can absorb the change of scale that a cut of the head width brings.

    Attributes:
        axis: the axis to which the head width is proportional.
        rows: weight rows and bias entries to multiply.
    """

    axis: Atom
    rows: tuple[Rows, ...]


def foldable_scales(record: Record) -> tuple[FoldableScale, ...]:
    """The default scales that can be kept; the head widths of the others are frozen.

    Args:
        record: the finished trace.
    """
    found = []
    readers = Readers(record)
    for scale in record.default_scales:
        if is_frozen(scale.width):
            continue
        axis = _scaling_axis(scale.width)
        where = f"the attention in module {scale.module!r} divides by its root"
        if axis is None:
            freeze(scale.width, f"{where} and the head width has several parts")
            continue
        try:
            found.append(FoldableScale(axis=axis, rows=_rows(record, scale, readers)))
        except UnknownQueryError as unknown:
            freeze(scale.width, f"{where} and {unknown}")
    return tuple(dict.fromkeys(found))


def _rows(record: Record, scale: DefaultScale, readers: Readers) -> tuple[Rows, ...]:
    """The rows behind the queries or, where these cannot be scaled alone, behind the keys.

    Raises:
        UnknownQueryError: neither can be scaled alone; names the reason for the queries.
    """
    ends = {end: _trail_or_error(record, tensor) for end, tensor in (("queries", scale.query), ("keys", scale.key))}
    problems = []
    for end, other, tensor in (("queries", "keys", scale.key), ("keys", "queries", scale.query)):
        own, rest = ends[end], ends[other]
        if isinstance(own, UnknownQueryError):
            problems.append(own)
        elif reads_any(record, tensor, own.names) if isinstance(rest, UnknownQueryError) else own.overlaps(rest):
            problems.append(UnknownQueryError("queries and keys share weights"))
        elif (reader := readers.others(own, scale.call)) is not None:
            problems.append(UnknownQueryError(f"{reader!r} reads the {end} too"))
        else:
            return own.rows
    raise problems[0]


def _trail_or_error(record: Record, tensor: Tensor) -> Trail | UnknownQueryError:
    """The trail of a tensor, or why there is none: one end of an attention may have no trail if the other has."""
    try:
        return trail(record, tensor)
    except UnknownQueryError as unknown:
        return unknown


def _scaling_axis(width: Atom) -> Atom | None:
    """The one axis to which a head width is proportional; ``None`` without one."""
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


def scale_folds(scales: Iterable[FoldableScale], names: Mapping[int, str]) -> tuple[ScaleFold, ...]:
    """The folds of the scales whose axis became a group.

    Args:
        scales: default scales that can be kept.
        names: name of each group, by identity of its axis.
    """
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

    Args:
        record: the finished trace.
        size_of: function from a term to its size over kept widths.
    """
    found = {}
    for scale in record.default_scales:
        root = find(scale.width).size ** -0.5
        for name, value in vars(record.modules[scale.module]).items():
            if type(value) is float and value == root:
                found[scale.module, name] = HeadScale(
                    module=scale.module, name=name, before=value, size=size_of(scale.width)
                )
    return list(found.values())
