"""Which rows make the queries of a default-scale attention: they take up the change of ``1 / sqrt(head width)``.

From the query one walks back through operators that pass a positive factor on (linear ones, pooling, ReLU), to the last
affine ones: a linear layer or convolution (weight rows and bias) or a norm (scale and shift). Multiplying these rows by
a positive number multiplies the query by it. The positions come from replaying the layout operators on tensors of
indices. Keys are the same to all this.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunecli.graph.axes.record import Call, Made, Record
from prunecli.graph.axes.rules.registry import words, wrap

_Step = Callable[[Tensor], Tensor]

_IDENTITY = words("clone detach alias contiguous _to_copy lift_fresh native_dropout relu leaky_relu")
_VIEWS = words("view _unsafe_view reshape _reshape_alias")
_LAYOUT = _VIEWS | words(
    "t transpose permute squeeze unsqueeze expand select slice unbind split split_with_sizes chunk"
)
_POOLED_DIMS = words("amax amin mean sum")
_POOLED_PLANES = words(
    "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d",
    "mkldnn_adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d",
)
_BATCH_NORMS = words(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training",
    "_batch_norm_no_update _batch_norm_with_update cudnn_batch_norm batch_norm",
)


class UnknownQueryError(Exception):
    """The way from the query back to its weights cannot be followed; the message names where it ends."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Positions of one tensor along one dimension."""

    tensor: str
    dim: int
    positions: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Trail:
    """The way from stored tensors to a query.

    Attributes:
        rows: weight rows and bias entries in which the query is linear.
        tensors: every tensor on the way from these to the query.
    """

    rows: tuple[Rows, ...]
    tensors: tuple[Tensor, ...]

    @property
    def names(self) -> frozenset[str]:
        """The stored tensors the rows belong to."""
        return frozenset(rows.tensor for rows in self.rows)

    def overlaps(self, other: Trail) -> bool:
        """Whether a row belongs to both."""
        taken = {(rows.tensor, rows.dim): rows.positions for rows in other.rows}
        return any(rows.positions & taken.get((rows.tensor, rows.dim), frozenset()) for rows in self.rows)


def trail(record: Record, query: Tensor) -> Trail:
    """The way from a query back to the rows that make it.

    Args:
        record: the finished trace.
        query: output of a recorded call.

    Raises:
        UnknownQueryError: an operator on the way is not linear in the query, or its weights are no plain parameters.
    """
    found: dict[tuple[str, int], frozenset[int]] = {}
    tensors: list[Tensor] = []
    for rows in _walk(record, query, [], tensors):
        key = (rows.tensor, rows.dim)
        found[key] = found.get(key, frozenset()) | rows.positions
    made = tuple(Rows(tensor=tensor, dim=dim, positions=at) for (tensor, dim), at in found.items())
    return Trail(rows=made, tensors=tuple(tensors))


def _walk(record: Record, tensor: Tensor, path: list[_Step], tensors: list[Tensor]) -> list[Rows]:
    """The rows behind a tensor; ``path`` leads from it to the query, and ``tensors`` collects those on the way."""
    tensors.append(tensor)
    if record.peek(tensor).origin is not None and tensor.dim() == 1:
        return _entries(record, tensor, 0, torch.arange(len(tensor)), path)
    made = record.made(tensor)
    if made is None:
        raise UnknownQueryError("the query is no output of a layer")
    if any(tensor is source for source in made.call.inputs):
        raise UnknownQueryError(f"the query is overwritten by {made.call.name!r}")
    sources = _linear_sources(record, made, tensor.shape)
    if sources is None:
        return _affine_rows(record, made.call, path, tensors)
    return [rows for source, step in sources for rows in _walk(record, source, [step, *path], tensors)]


def _linear_sources(record: Record, made: Made, shape: torch.Size) -> list[tuple[Tensor, _Step]] | None:
    """The tensors in which a linear operator's output is linear, each with its step; ``None`` for other operators."""
    call = made.call
    if call.name in _IDENTITY:
        return [(call.args[0], lambda index: index)]
    if call.name in _LAYOUT:
        return [(call.args[0], _replay(call, made.position))]
    if call.name in _POOLED_DIMS:
        return [(call.args[0], _pooled(wrap(call.get(1, "dim"), call.args[0].dim()), shape))]
    if call.name in _POOLED_PLANES and made.position == 0:
        return [(call.args[0], _pooled([len(shape) - 2, len(shape) - 1], shape))]
    if call.name in {"mul", "div", "neg"}:
        return [(_scaled_operand(record, call), _expanded(shape))]
    if call.name in {"add", "sub"}:
        if not all(isinstance(part, Tensor) for part in call.args[:2]):
            raise UnknownQueryError("a number is added to the query")
        return [(part, _expanded(shape)) for part in call.args[:2]]
    if call.name in {"cat", "stack"}:
        return [(part, _embedded(call, i)) for i, part in enumerate(call.args[0])]
    return None


def _replay(call: Call, position: int) -> _Step:
    """A layout operator applied to a tensor of indices."""
    if call.name in _VIEWS:  # entries of the index tensor may lie elsewhere in memory, where a view is a copy
        return lambda index: index.reshape(call.out.shape)

    def step(index: Tensor) -> Tensor:
        out = call.function(index, *call.args[1:], **call.kwargs)
        return out if isinstance(out, Tensor) else out[position]

    return step


def _pooled(dims: Sequence[int], shape: torch.Size) -> _Step:
    """Pooling over dimensions along which nothing but positions varies."""

    def step(index: Tensor) -> Tensor:
        first = index
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        if not torch.equal(first.expand_as(index), index):
            raise UnknownQueryError("the query is pooled over its features")
        kept = first if len(shape) == first.dim() else first.squeeze(tuple(dims))
        return kept.expand(shape)

    return step


def _expanded(shape: torch.Size) -> _Step:
    return lambda index: index.expand(shape)


def _embedded(call: Call, position: int) -> _Step:
    """One part of a concatenation; -1 marks entries of the other parts."""

    def step(index: Tensor) -> Tensor:
        parts = [torch.full(part.shape, -1) for part in call.args[0]]
        parts[position] = index
        return call.function(parts, *call.args[1:], **call.kwargs)  # type: ignore[no-any-return]

    return step


def _scaled_operand(record: Record, call: Call) -> Tensor:
    """The one factor of a product that comes from the network's input."""
    operands = [arg for arg in call.args if isinstance(arg, Tensor)]
    varying = [operand for operand in operands if record.peek(operand).data]
    if len(varying) != 1 or (call.name == "div" and varying[0] is not call.args[0]):
        raise UnknownQueryError(f"the query is a {call.name!r} of two tensors that depend on the input")
    return varying[0]


def _affine_rows(record: Record, call: Call, path: list[_Step], tensors: list[Tensor]) -> list[Rows]:
    """The parameter entries behind each feature of an affine operator's output."""
    weight, bias, axis = _affine_parameters(call)
    out = call.outputs[0]
    shape = [1] * out.dim()
    shape[axis] = -1

    def along(index: Tensor) -> Tensor:
        return index.view(shape).expand(out.shape)

    rows = _entries(record, *weight, torch.arange(out.shape[axis]), [along, *path])
    return rows + (_walk(record, bias, [along, *path], tensors) if bias is not None else [])


def _affine_parameters(call: Call) -> tuple[tuple[Tensor, int], Tensor | None, int]:
    """Weight with its feature dimension, bias, and the feature dimension of the output."""
    match call.name:
        case "mm":
            return (call.args[1], 1), None, -1
        case "addmm":
            return (call.args[2], 1), call.args[0], -1
        case "convolution":
            return (call.args[1], 0), call.args[2], 1
        case name if name in _BATCH_NORMS and call.args[1] is not None:
            return (call.args[1], 0), call.args[2], 1
        case "native_layer_norm" | "rms_norm" | "_fused_rms_norm":
            weight = call.get(2, "weight")
            if weight is None or len(call.args[1]) != 1:
                raise UnknownQueryError("the query comes from a norm without a scale")
            return (weight, 0), call.get(3, "bias") if call.name == "native_layer_norm" else None, -1
    raise UnknownQueryError(f"{call.name!r} is not known to be linear in the query")


def reads_any(record: Record, tensor: Tensor, names: Collection[str]) -> bool:
    """Whether one of the stored tensors ``names`` takes part in making ``tensor``, through any number of calls."""
    queue, seen = [tensor], set()
    while queue:
        current = queue.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if not set(record.names.get(id(current), ())).isdisjoint(names):
            return True
        made = record.made(current)
        queue += made.call.inputs if made is not None else []
    return False


class Readers:
    """Which calls read which tensor, over a whole trace."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._calls: dict[int, list[Call]] = {}
        for step in record.steps:
            for tensor in step.call.inputs:
                self._calls.setdefault(id(tensor), []).append(step.call)

    def others(self, found: Trail, own: Call) -> str | None:
        """The name of another operator that reads what the rows of a trail make, if there is one.

        Operators that only take other parts of a fused projection do not count.

        Args:
            found: the way from the rows to the query.
            own: the attention call of the query.
        """
        on_the_way = {id(tensor) for tensor in found.tensors}
        for tensor in found.tensors:
            for call in self._calls.get(id(tensor), ()):
                if call is own or any(id(out) in on_the_way for out in call.outputs):
                    continue
                if not (call.name in _LAYOUT and all(self._apart(out, found) for out in call.outputs)):
                    return call.name
        for name in found.names:
            readers = self._calls.get(id(self._record.homes[name]), ())
            if len(readers) > 1:
                return readers[1].name
        return None

    def _apart(self, tensor: Tensor, found: Trail) -> bool:
        try:
            return not trail(self._record, tensor).overlaps(found)
        except UnknownQueryError:
            return False


def _entries(record: Record, parameter: Tensor, dim: int, index: Tensor, path: Sequence[_Step]) -> list[Rows]:
    """Which entries of a stored tensor along ``dim`` arrive at the end of ``path``, started with their numbers."""
    value = record.peek(parameter)
    if value.data or value.origin is None:
        raise UnknownQueryError("the weights of the query are computed, not stored")
    seen = torch.zeros(len(index) + 1, dtype=torch.bool)
    for step in path:
        index = step(index)
    for at, stride in enumerate(index.stride()):
        index = index if stride else index.narrow(at, 0, 1)  # entries along it are one and the same
    seen[index.reshape(-1)] = True  # -1, from other parts, marks the extra last entry
    positions = frozenset(seen[:-1].nonzero().flatten().tolist())
    name, dims = value.origin
    return [Rows(tensor=name, dim=dims[dim], positions=positions)] if positions else []
