"""Elementwise operators: operands are lined up as broadcasting does, and are one axis where they meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from prunecli.graph.axes.record import Call, Record
from prunecli.graph.axes.rules.registry import rule, silent_at, words
from prunecli.graph.axes.terms import Atom, find, unify

_ZERO_KEEPING = words(
    "abs asin asinh atan ceil celu deg2rad elu erf expm1 floor frac gelu hardshrink hardswish leaky_relu log1p",
    "mish neg nan_to_num positive prelu _prelu_kernel real relu relu6 round rrelu selu sgn sign silu sin sinh",
    "softshrink sqrt square tan tanh tanhshrink trunc",
)
_FIRST_DECIDES = words("div fmod remainder floor_divide")
_ALL_ZERO = frozenset({"add", "sub", "maximum", "minimum", "fmax", "fmin", "hypot", "lerp", "atan2"})


def _keeps_silence(record: Record, call: Call, out: Tensor, dim: int) -> bool:
    """Whether an elementwise operator gives zero where its operands are silenced."""
    name = call.name.rstrip("_")
    at = [silent_at(record, arg, out, dim) for arg in call.args]
    if name in _ZERO_KEEPING or name in _FIRST_DECIDES:
        return at[0]
    if name in _ALL_ZERO:
        return all(at[:2])
    special = _SPECIAL.get(name)
    return special is not None and special(call, at)


def _pow(call: Call, at: list[bool]) -> bool:
    return at[0] and isinstance(call.args[1], int | float) and call.args[1] > 0


def _masked_fill(call: Call, at: list[bool]) -> bool:
    return at[0] and not isinstance(call.args[2], Tensor) and call.args[2] == 0


def _clamp(call: Call, at: list[bool]) -> bool:
    """Zero stays zero when it lies within the bounds."""
    name = call.name.rstrip("_")
    low = None if name == "clamp_max" else call.get(1, "min")
    high = call.get(1, "max") if name == "clamp_max" else None if name == "clamp_min" else call.get(2, "max")
    if name == "hardtanh":
        low, high = call.get(1, "min_val", -1), call.get(2, "max_val", 1)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return False
    return at[0] and (low is None or low <= 0) and (high is None or high >= 0)


_SPECIAL: dict[str, Callable[[Call, list[bool]], bool]] = {
    "mul": lambda _, at: any(at[:2]),
    "bitwise_and": lambda _, at: any(at[:2]),
    "logical_and": lambda _, at: any(at[:2]),
    "where": lambda _, at: all(at[1:3]),
    "addcmul": lambda _, at: at[0] and any(at[1:3]),
    "pow": _pow,
    "masked_fill": _masked_fill,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "hardtanh": _clamp,
}


def broadcast(record: Record, inputs: Iterable[Tensor], out: Tensor) -> list[Atom]:
    """The terms of an elementwise operator's output.

    Args:
        record: the trace so far.
        inputs: the operands, whose dimensions are unified as broadcasting lines them up.
        out: the output.
    """
    dims: list[Atom | None] = [None] * out.dim()
    for tensor in inputs:
        for back, dim in enumerate(reversed(record.dims(tensor)), start=1):
            if find(dim).size == 1 and out.shape[-back] != 1:
                continue
            known = dims[-back]
            if known is None:
                dims[-back] = dim
            else:
                unify(known, dim)
    return [Atom(size) if dim is None else dim for dim, size in zip(dims, out.shape, strict=True)]


def pointwise(record: Record, call: Call) -> None:
    """The rule of every elementwise operator without one of its own.

    Args:
        record: the trace so far.
        call: the call, after it ran.
    """
    for out in call.outputs:
        dims = broadcast(record, call.inputs, out)
        record.put(out, dims, [_keeps_silence(record, call, out, d) for d in range(out.dim())])


@rule("copy_")
def _copy(record: Record, call: Call) -> None:
    target, source = call.args[:2]
    dims = broadcast(record, [target, source], target)
    record.put(call.out, dims, [silent_at(record, source, target, d) for d in range(target.dim())])
