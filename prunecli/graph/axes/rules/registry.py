"""The table of rules, and helpers of rules. A rule turns the terms of an operator's inputs into its outputs'."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from prunecli.graph.axes.record import Call, Record, TensorAxes
from prunecli.graph.axes.terms import (
    Atom,
    MisfitError,
    blocks,
    find,
    freeze,
    leaves,
    merge_frozen_runs,
    product,
    split_front,
    take,
)

Rule = Callable[[Record, Call], None]
RULES: dict[str, Rule] = {}

SPATIAL = "it is a spatial axis (image or feature-map positions)"
POSITIONS = "its values depend on the position along it"
BY_PRODUCT = "it is a by-product of a norm"


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the names of its operators (a decorator)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def words(*lines: str) -> frozenset[str]:
    """The names in some lines, separated by spaces, as a set."""
    return frozenset(word for line in lines for word in line.split())


def wrap(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Dimension arguments as non-negative indices.

    Args:
        dims: one dimension or several, counted from either end; ``None`` or empty for all.
        rank: number of dimensions of the tensor.
    """
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(rank))
    return [d % max(rank, 1) for d in ([dims] if isinstance(dims, int) else dims)]


def cut(record: Record, dim: Atom, sizes: Sequence[int]) -> list[Atom]:
    """Consecutive blocks of a dimension; where they do not line up with its parts, the dimension is frozen.

    Args:
        record: the trace so far, for the place in the reason.
        dim: the dimension.
        sizes: size of each block.
    """
    try:
        return blocks(dim, sizes)
    except MisfitError as misfit:
        reason = f"{record.place} cuts it where its parts do not line up ({misfit})"
        freeze(dim, reason)
        return [Atom(size, reason) for size in sizes]


def rows(record: Record, dim: Atom, count: int) -> tuple[Atom, Atom]:
    """A dimension as rows x inside; where that does not line up with its parts, the dimension is frozen.

    Args:
        record: the trace so far, for the place in the reason.
        dim: the dimension.
        count: number of rows.
    """
    try:
        return split_front(dim, count)
    except MisfitError as misfit:
        reason = f"{record.place} groups it where its parts do not line up ({misfit})"
        freeze(dim, reason)
        return Atom(count, reason), Atom(find(dim).size // count, reason)


def flat_sizes(args: Sequence[Any]) -> list[int]:
    """The sizes of a call ``f(*sizes)`` or ``f(sizes)`` as a list."""
    return list(args[0]) if len(args) == 1 and isinstance(args[0], list | tuple) else list(args)


def regroup(dims: Iterable[Atom], sizes: Iterable[int]) -> list[Atom]:
    """Row-major dimensions regrouped to new sizes of the same product.

    Raises:
        MisfitError: their parts do not line up with the new sizes.
    """
    queue = merge_frozen_runs([factor for dim in dims for factor in _open(dim)])
    return [product(take(queue, size)) for size in sizes]


def _open(dim: Atom) -> list[Atom]:
    """The factors of a dimension, those of size 1 included."""
    dim = find(dim)
    return [factor for kid in dim.kids for factor in _open(kid)] if dim.form == "product" else [dim]


def regrouped_silence(value: TensorAxes, dims: Sequence[Atom]) -> list[bool]:
    """The silence of regrouped dimensions ``dims``, from that of the axes they are made of."""
    rows = (value.dims,) if value.entries is None else value.entries.rows
    known = [(dim, silent) for row in rows for dim, silent in zip(row, value.silent, strict=True)]
    loud = {leaf for dim, silent in known if not silent for leaf in leaves(dim)}
    return [all(leaf.reason is not None or leaf not in loud for leaf in leaves(dim)) for dim in dims]


def unrelated(out: Tensor, reason: str) -> list[Atom]:
    """New frozen axes for every dimension of ``out``."""
    return [Atom(size, reason) for size in out.shape]


def silent_at(record: Record, tensor: Any, out: Tensor, dim: int) -> bool:
    """Whether an operand is zero in silenced channels of an output's dimension.

    Args:
        record: the trace so far.
        tensor: the operand, a tensor or a number.
        out: the output, to which the operand is broadcast.
        dim: dimension of the output.
    """
    if not isinstance(tensor, Tensor):
        return isinstance(tensor, int | float) and tensor == 0
    own = dim - (out.dim() - tensor.dim())
    if own < 0 or tensor.shape[own] != out.shape[dim]:
        return False
    return record.value(tensor).silent[own]


def opaque(record: Record, call: Call) -> None:
    """Freeze all axes of an operator that cannot be followed, and count it among the unknown ones."""
    reason = f"{record.place} calls the operator {call.name!r}, for which there is no rule"
    for tensor in call.inputs:
        record.freeze(record.dims(tensor), reason)
    for out in call.outputs:
        record.put(out, unrelated(out, reason), silent=False)
    record.unknown[call.name] += 1
