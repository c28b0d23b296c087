"""What each aten operator does to axes: one rule per family, found by operator name in `RULES`.

A rule reads the terms of the inputs, states what is the same axis (`unify`), freezes what it cannot follow, and records
the terms of the outputs. It also says on which output dimensions silenced channels are still zero (`Value.silent`):
only then may a later contraction or sum run over them, and the cut net equal the silenced one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunecli.axes.record import KERNEL, Call, DefaultScale, Record, Value
from prunecli.axes.terms import (
    Atom,
    MisfitError,
    blocks,
    concat,
    find,
    freeze,
    is_frozen,
    leaves,
    merge_frozen_runs,
    product,
    split_front,
    take,
    unify,
)

Rule = Callable[[Record, Call], None]
RULES: dict[str, Rule] = {}

SPATIAL = "it is a spatial axis (image or feature-map positions)"
POSITIONS = "its values depend on the position along it"
ONE_LENGTH = "it is broadcast to a length that no module attribute gives"


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _wrap(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Dimension arguments as non-negative indices; None or empty means all."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(rank))
    return [d % max(rank, 1) for d in ([dims] if isinstance(dims, int) else dims)]


def _cut(record: Record, dim: Atom, sizes: Sequence[int]) -> list[Atom]:
    """Consecutive blocks of a dimension; where they do not line up, the dimension is frozen."""
    try:
        return blocks(dim, sizes)
    except MisfitError as misfit:
        reason = f"{record.place} cuts it where its parts do not line up ({misfit})"
        freeze(dim, reason)
        return [Atom(size, reason) for size in sizes]


def _rows(record: Record, dim: Atom, count: int) -> tuple[Atom, Atom]:
    """A dimension as ``count`` rows x inside; where that does not line up, the dimension is frozen."""
    try:
        return split_front(dim, count)
    except MisfitError as misfit:
        reason = f"{record.place} groups it where its parts do not line up ({misfit})"
        freeze(dim, reason)
        return Atom(count, reason), Atom(find(dim).size // count, reason)


# ------------------------------------------------------------------------------------------------ elementwise

_ZERO_KEEPING = frozenset(
    ["abs", "asin", "asinh", "atan", "ceil", "celu", "clone", "contiguous", "deg2rad", "elu", "erf", "expm1", "floor", "gelu", "hardswish", "hardshrink", "leaky_relu", "log1p", "mish", "neg", "nan_to_num", "positive", "relu", "relu6", "round", "rrelu", "selu", "sgn", "sign", "silu", "sin", "sinh", "softshrink", "sqrt", "square", "tan", "tanh", "tanhshrink", "trunc", "frac", "_prelu_kernel", "prelu", "real"]
)
_ALL_ZERO = frozenset({"add", "sub", "maximum", "minimum", "fmax", "fmin", "hypot", "lerp", "atan2"})


def _silent_at(record: Record, tensor: Any, out: Tensor, dim: int) -> bool:
    """Whether an operand, broadcast to ``out``, is zero in silenced channels of ``out``'s dimension ``dim``."""
    if not isinstance(tensor, Tensor):
        return isinstance(tensor, int | float) and tensor == 0
    own = dim - (out.dim() - tensor.dim())
    if own < 0 or tensor.shape[own] != out.shape[dim]:
        return False
    return record.value(tensor).silent[own]


def _pointwise_silence(record: Record, call: Call, out: Tensor, dim: int) -> bool:
    """Whether an elementwise operator keeps zero what is silenced."""
    name = call.name.rstrip("_")
    args = call.args
    at = [_silent_at(record, arg, out, dim) for arg in args]
    if name in {"mul", "bitwise_and", "logical_and"}:
        return any(at[:2])
    if name in _ALL_ZERO:
        return all(at[:2])
    if name in _ZERO_KEEPING or name in {"div", "fmod", "remainder", "floor_divide"}:
        return at[0]
    if name == "pow":
        return at[0] and isinstance(args[1], int | float) and args[1] > 0
    if name in {"clamp", "hardtanh", "clamp_min", "clamp_max"}:
        return at[0] and _clamp_holds_zero(name, call)
    if name == "where":
        return all(at[1:3])
    if name == "masked_fill":
        return at[0] and args[2] == 0 if not isinstance(args[2], Tensor) else False
    if name == "addcmul":
        return at[0] and (at[1] or at[2])
    return False


def _clamp_holds_zero(name: str, call: Call) -> bool:
    low = call.get(1, "min") if name != "clamp_max" else None
    high = call.get(1, "max") if name == "clamp_max" else call.get(2, "max") if name != "clamp_min" else None
    if name == "hardtanh":
        low, high = call.get(1, "min_val", -1), call.get(2, "max_val", 1)
    bounds = [bound for bound in (low, high) if bound is not None]
    if any(isinstance(bound, Tensor) for bound in bounds):
        return False
    return (low is None or low <= 0) and (high is None or high >= 0)


def broadcast(record: Record, inputs: Iterable[Tensor], out: Tensor) -> list[Atom]:
    """The terms of ``out``, its inputs' dimensions unified as broadcasting lines them up."""
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
    """Any elementwise operator."""
    for out in call.outputs:
        dims = broadcast(record, call.inputs, out)
        record.put(out, dims, [_pointwise_silence(record, call, out, d) for d in range(out.dim())])


@_rule("copy_")
def _copy(record: Record, call: Call) -> None:
    target, source = call.args[:2]
    dims = broadcast(record, [target, source], target)
    record.put(call.out, dims, [_silent_at(record, source, target, d) for d in range(target.dim())])


@_rule("clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "lift_fresh_copy", "native_dropout")
def _same(record: Record, call: Call) -> None:
    value = record.value(call.args[0])
    for out in call.outputs:
        record.put(out, value.dims, value.silent, origin=value.origin)


@_rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "fill_", "zero_")
def _filled_like(record: Record, call: Call) -> None:
    zero = call.name in {"zeros_like", "zero_"} or (call.name in {"full_like", "fill_"} and call.get(1, "value") == 0)
    record.put(call.out, record.dims(call.args[0]), zero)


# ------------------------------------------------------------------------------------------------ layout


@_rule("view", "_unsafe_view", "_reshape_alias", "reshape")
def _view(record: Record, call: Call) -> None:
    source, out = call.args[0], call.out
    value = record.value(source)
    queue = merge_frozen_runs([factor for dim in value.dims for factor in _open(dim)])
    dims: list[Atom] = []
    try:
        dims.extend(product(take(queue, size)) for size in out.shape)
    except MisfitError as misfit:
        reason = f"{record.place} reshapes it where its parts do not line up ({misfit})"
        record.freeze([*value.dims, *dims], reason)
        dims += [Atom(size, reason) for size in out.shape[len(dims) :]]
    record.put(out, dims, _regrouped_silence(value, dims), origin=_viewed_origin(value, source, out))


def _open(dim: Atom) -> list[Atom]:
    dim = find(dim)
    return [factor for kid in dim.kids for factor in _open(kid)] if dim.form == "product" else [dim]


def _viewed_origin(value: Value, source: Tensor, out: Tensor) -> tuple[str, tuple[int, ...]] | None:
    """A view that only drops or adds size-1 dimensions at the end keeps the origin (a 1x1 kernel used by a matmul)."""
    rank = min(source.dim(), out.dim())
    same = source.shape[:rank] == out.shape[:rank]
    if value.origin is None or not same or out.dim() > source.dim():
        return None
    return value.origin[0], value.origin[1][:rank]


def _regrouped_silence(value: Value, dims: Sequence[Atom]) -> list[bool]:
    """Silence of regrouped dimensions: each axis keeps what it had."""
    loud = {leaf for dim, silent in zip(value.dims, value.silent, strict=True) if not silent for leaf in leaves(dim)}
    return [all(leaf.reason is not None or leaf not in loud for leaf in leaves(dim)) for dim in dims]


def _reordered(record: Record, call: Call, order: Sequence[int]) -> None:
    value = record.value(call.args[0])
    origin = value.origin and (value.origin[0], tuple(value.origin[1][d] for d in order))
    record.put(call.out, [value.dims[d] for d in order], [value.silent[d] for d in order], origin=origin)


@_rule("t", "numpy_T")
def _t(record: Record, call: Call) -> None:
    _reordered(record, call, list(range(call.args[0].dim()))[::-1])


@_rule("transpose", "swapaxes")
def _transpose(record: Record, call: Call) -> None:
    order = list(range(call.args[0].dim()))
    first, second = call.args[1:3]
    order[first], order[second] = order[second], order[first]
    _reordered(record, call, order)


@_rule("permute")
def _permute(record: Record, call: Call) -> None:
    _reordered(record, call, call.args[1])


@_rule("squeeze")
def _squeeze(record: Record, call: Call) -> None:
    shape = call.args[0].shape
    dropped = {d for d in _wrap(call.get(1, "dim"), len(shape)) if shape[d] == 1}
    _reordered(record, call, [d for d in range(len(shape)) if d not in dropped])


@_rule("unsqueeze")
def _unsqueeze(record: Record, call: Call) -> None:
    value = record.value(call.args[0])
    at = call.args[1] % (len(value.dims) + 1)
    record.put(call.out, [*value.dims[:at], Atom(1), *value.dims[at:]], [*value.silent[:at], False, *value.silent[at:]])


@_rule("expand")
def _expand(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    new = out.dim() - len(value.dims)
    name, args, _ = record.request
    asked = _flat_sizes(args[1:]) if name == "expand" else None
    dims, silent = [], []
    for d, size in enumerate(out.shape):
        if d >= new and call.args[0].shape[d - new] == size:
            dims.append(value.dims[d - new])
            silent.append(value.silent[d - new])
        else:
            dims.append(record.sized(asked[d]) if asked and len(asked) == out.dim() else Atom(size, ONE_LENGTH))
            silent.append(False)
    record.put(out, dims, silent)


def _flat_sizes(args: Sequence[Any]) -> list[int]:
    """``f(*sizes)`` or ``f(sizes)`` as a list."""
    return list(args[0]) if len(args) == 1 and isinstance(args[0], list | tuple) else list(args)


@_rule("repeat")
def _repeat(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    new = out.dim() - len(value.dims)
    dims, silent = [], []
    for d, times in enumerate(call.args[1]):
        copies = Atom(times, f"{record.place} repeats the tensor along it")
        dims.append(product([copies, value.dims[d - new]]) if d >= new else copies)
        silent.append(d >= new and value.silent[d - new])
    record.put(out, dims, silent)


# ------------------------------------------------------------------------------------------------ contractions


@_rule("mm")
def _mm(record: Record, call: Call) -> None:
    _matmul(record, call, call.args[0], call.args[1], None)


@_rule("addmm")
def _addmm(record: Record, call: Call) -> None:
    _matmul(record, call, call.args[1], call.args[2], call.args[0])


@_rule("bmm")
def _bmm(record: Record, call: Call) -> None:
    _matmul(record, call, call.args[0], call.args[1], None)


@_rule("baddbmm")
def _baddbmm(record: Record, call: Call) -> None:
    _matmul(record, call, call.args[1], call.args[2], call.args[0])


def _matmul(record: Record, call: Call, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
    """``[*batch, m, k] @ [*batch, k, n] (+ bias)``."""
    x, y = record.value(left), record.value(right)
    batched = left.dim() == 3
    if batched:
        unify(x.dims[0], y.dims[0])
    record.contract(left, -1, right, -2)
    rank = left.dim()
    record.weigh(right, produced=[rank - 1], contracted=[rank - 2])
    record.weigh(left, produced=[rank - 2], contracted=[rank - 1])
    if batched and x.data and y.data:
        record.heads.append(x.dims[0])
        record.head_dims.append(x.dims[-1])
    dims = [*x.dims[:-1], y.dims[-1]]
    record.cost(call.name, [*dims, x.dims[-1]])
    silent = [x.silent[-2], y.silent[-1]]
    if batched:
        silent.insert(0, x.silent[0] or y.silent[0])
    if bias is not None:
        for dim, own in zip(reversed(dims), reversed(record.dims(bias)), strict=False):
            unify(dim, own)
        silent = [flag and _silent_at(record, bias, call.out, d) for d, flag in enumerate(silent)]
    record.put(call.out, dims, silent)


@_rule("mv")
def _mv(record: Record, call: Call) -> None:
    matrix, vector = call.args[:2]
    record.contract(matrix, 1, vector, 0)
    record.weigh(matrix, produced=[0], contracted=[1])
    record.weigh(vector, produced=[], contracted=[0])
    record.put(call.out, record.dims(matrix)[:1], record.value(matrix).silent[:1])


@_rule("dot")
def _dot(record: Record, call: Call) -> None:
    record.contract(call.args[0], 0, call.args[1], 0)
    record.put(call.out, [], True)


@_rule("convolution", "_convolution", "mkldnn_convolution")
def _convolution(record: Record, call: Call) -> None:
    source, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    x, w = record.value(source), record.value(weight)
    reads, writes = (0, 1) if transposed else (1, 0)
    if groups == 1:
        record.contract(source, 1, weight, reads)
        produced = w.dims[writes]
        silent = w.silent[writes]
    else:
        produced, silent = _grouped(record, x, w, groups, transposed=transposed)
    record.weigh(weight, produced=[writes], contracted=[reads])
    if bias is not None:
        unify(produced, record.dims(bias)[0])
        silent = silent and record.value(bias).silent[0]
    record.freeze(w.dims[2:], KERNEL)
    record.freeze(x.dims[2:], SPATIAL)
    spatial = [Atom(size, SPATIAL) for size in call.out.shape[2:]]
    record.cost("conv", [*(x.dims[2:] if transposed else spatial), *w.dims])
    record.put(call.out, [x.dims[0], produced, *spatial], [False, silent, *[False] * len(spatial)])


def _grouped(record: Record, x: Value, w: Value, groups: int, *, transposed: bool) -> tuple[Atom, bool]:
    """A grouped convolution: its output channels are groups x what each group writes.

    Depthwise convolution is the case of one input channel per group. A convolution's weight is [groups * out, in, …],
    a transposed one's [groups * in, out, …].
    """
    outer, inside_w = _rows(record, w.dims[0], groups)
    group_x, inside_x = _rows(record, x.dims[1], groups)
    unify(outer, group_x)
    request, args, kwargs = record.request
    if request.startswith("conv"):
        record.equate(kwargs.get("groups", args[6] if len(args) > 6 else groups), [outer])
    else:
        freeze(outer, f"its grouping is fixed in {record.place}")
    if not x.silent[1] and not w.silent[0]:
        record.freeze([x.dims[1]], f"{record.place} sums over it where silenced channels are not zero")
    if transposed:
        unify(inside_w, inside_x)
        return product([outer, w.dims[1]]), w.silent[0] and w.silent[1]
    unify(w.dims[1], inside_x)
    return w.dims[0], w.silent[0]


@_rule("scaled_dot_product_attention")
def sdpa(record: Record, call: Call) -> None:
    """Attention in one call: ``softmax(q k^T * scale + mask) v`` on [*batch, tokens, features]."""
    query, key, values = call.args[:3]
    q, k, v = (record.value(t) for t in (query, key, values))
    for d in range(len(q.dims) - 2):
        unify(q.dims[d], k.dims[d])
        unify(q.dims[d], v.dims[d])
    record.contract(query, -1, key, -1)
    unify(k.dims[-2], v.dims[-2])
    record.freeze([k.dims[-2]], f"{record.place} takes a softmax over it")
    batch = list(q.dims[:-2])
    mask = call.get(3, "attn_mask")
    if mask is not None:
        for dim, own in zip(reversed([*batch, q.dims[-2], k.dims[-2]]), reversed(record.dims(mask)), strict=False):
            unify(dim, own)
    record.heads.extend(batch)
    record.head_dims.extend((q.dims[-1], v.dims[-1]))
    if call.get(6, "scale") is None:
        record.default_scales.append(DefaultScale(module=record.module, query=query, key=key, width=q.dims[-1]))
    record.cost("sdpa.qk", [*batch, q.dims[-2], q.dims[-1], k.dims[-2]])
    record.cost("sdpa.av", [*batch, q.dims[-2], v.dims[-2], v.dims[-1]])
    silent = [*v.silent[: len(batch)], False, v.silent[-1]]
    for out in call.outputs[:1]:
        record.put(out, [*batch, q.dims[-2], v.dims[-1]], silent)


# ------------------------------------------------------------------------------------------------ normalisation


def _affine_silent(record: Record, weight: Tensor | None, bias: Tensor | None) -> bool:
    """A norm's output is zero in silenced channels when its scale and its shift are (no shift will do)."""
    return weight is not None and all(record.value(weight).silent) and (bias is None or all(record.value(bias).silent))


@_rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
    "_batch_norm_with_update",
    "cudnn_batch_norm",
    "batch_norm",
)
def _batch_norm(record: Record, call: Call) -> None:
    x = record.value(call.args[0])
    own = [t for t in call.args[1:5] if isinstance(t, Tensor)]
    for tensor in own:
        unify(record.dims(tensor)[0], x.dims[1])
    has_statistics = len(call.args) > 4 and isinstance(call.args[3], Tensor)
    trains = call.name in {"native_batch_norm", "_native_batch_norm_legit"} and call.args[-3] is True
    if not has_statistics or trains:
        record.normalise([*x.dims[:1], *x.dims[2:]])
    silent = _affine_silent(record, call.args[1], call.args[2])
    first, *rest = call.outputs
    record.put(first, x.dims, [d == 1 and silent for d in range(first.dim())])
    for out in rest:
        record.put(out, [x.dims[1]] if list(out.shape) == [find(x.dims[1]).size] else _opaque(out), False)


@_rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(record: Record, call: Call) -> None:
    """LayerNorm and RMSNorm: a statistic over the last dimensions, then scale and shift there."""
    x = record.value(call.args[0])
    count = len(call.args[1])
    bias = call.args[3] if "layer" in call.name and len(call.args) > 3 else None
    weight = call.get(2, "weight")
    for tensor in (weight, bias):
        if isinstance(tensor, Tensor):
            for own, dim in zip(record.dims(tensor), x.dims[-count:], strict=True):
                unify(own, dim)
    record.normalise(x.dims[-count:])
    silent = _affine_silent(record, weight, bias)
    first, *rest = call.outputs
    outer = [flag and bias is None for flag in x.silent[:-count]]
    record.put(first, x.dims, [*outer, *[silent] * count])
    for out in rest:
        record.put(out, _opaque(out), False)


@_rule("native_group_norm")
def _group_norm(record: Record, call: Call) -> None:
    x = record.value(call.args[0])
    weight, bias, groups = call.args[1], call.args[2], call.args[6]
    for tensor in (weight, bias):
        if tensor is not None:
            unify(record.dims(tensor)[0], x.dims[1])
    if groups > 1:
        outer, _ = _rows(record, x.dims[1], groups)
        freeze(outer, f"it counts the groups of the group norm in {record.place}")
    record.normalise(x.dims[1:2])
    silent = _affine_silent(record, weight, bias)
    first, *rest = call.outputs
    record.put(first, x.dims, [d == 1 and silent for d in range(first.dim())])
    for out in rest:
        record.put(out, _opaque(out), False)


def _opaque(out: Tensor, reason: str = "it is a by-product of a norm") -> list[Atom]:
    return [Atom(size, reason) for size in out.shape]


@_rule("_softmax", "softmax", "_log_softmax", "_safe_softmax", "log_softmax")
def _softmax(record: Record, call: Call) -> None:
    value = record.value(call.args[0])
    freeze(value.dims[call.args[1]], f"{record.place} takes a softmax over it")
    record.put(call.out, value.dims, False)


# ------------------------------------------------------------------------------------------------ reductions


#: Statistics that a norm written out in Python takes over the axis it then scales.
_NORM_STATISTICS = frozenset({"mean", "var", "std", "var_mean", "std_mean"})


def _reduce(record: Record, call: Call, dims: int | Sequence[int] | None, *, zeros_vanish: bool) -> None:
    value = record.value(call.args[0])
    gone = set(_wrap(dims, len(value.dims)))
    for d in gone:
        if call.name in _NORM_STATISTICS and not is_frozen(value.dims[d]):
            record.normalise([value.dims[d]])
        elif not (zeros_vanish and value.silent[d]):
            freeze(value.dims[d], f"{record.place} reduces over it with {call.name!r}")
    keeps_zero = call.name not in {"logsumexp", "argmax", "argmin"}
    for out in call.outputs:
        keep = out.dim() == len(value.dims)
        kept = [d for d in range(len(value.dims)) if keep or d not in gone]
        record.put(
            out,
            [Atom(1) if d in gone else value.dims[d] for d in kept],
            [keeps_zero and d not in gone and value.silent[d] for d in kept],
        )


@_rule("sum")
def _sum(record: Record, call: Call) -> None:
    _reduce(record, call, call.get(1, "dim"), zeros_vanish=True)


@_rule("linalg_vector_norm")
def _vector_norm(record: Record, call: Call) -> None:
    order = call.get(1, "ord", 2)
    _reduce(record, call, call.get(2, "dim"), zeros_vanish=order is None or order > 0)


@_rule("norm")
def _norm(record: Record, call: Call) -> None:
    _reduce(record, call, call.get(2, "dim"), zeros_vanish=False)


@_rule("mean", "amax", "amin", "argmax", "argmin", "prod", "var", "std", "var_mean", "std_mean", "logsumexp")
@_rule("any", "all", "median", "count_nonzero")
def _statistic(record: Record, call: Call) -> None:
    dims = call.get(1, "dim")
    _reduce(record, call, None if isinstance(dims, bool) else dims, zeros_vanish=False)


@_rule("max", "min")
def _extreme(record: Record, call: Call) -> None:
    other = call.get(1, "dim")
    if isinstance(other, Tensor):
        pointwise(record, call)
    else:
        _reduce(record, call, other, zeros_vanish=False)


# ------------------------------------------------------------------------------------------------ blocks


@_rule("cat")
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


@_rule("stack")
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


@_rule("split", "split_with_sizes", "unsafe_split", "split_with_sizes_copy", "chunk", "tensor_split")
def _split(record: Record, call: Call) -> None:
    value = record.value(call.args[0])
    at = call.get(2, "dim", 0) % len(value.dims)
    parts = _cut(record, value.dims[at], [t.shape[at] for t in call.out])
    for out, part in zip(call.out, parts, strict=True):
        record.put(out, [*value.dims[:at], part, *value.dims[at + 1 :]], value.silent)


@_rule("slice")
def _slice(record: Record, call: Call) -> None:
    source, out = call.args[0], call.out
    value = record.value(source)
    at = call.get(1, "dim", 0) % len(value.dims)
    dim, total, length = value.dims[at], source.shape[at], out.shape[at]
    start, step = call.get(2, "start") or 0, call.get(4, "step", 1)
    start = start + total if start < 0 else min(start, total)
    if length == total:
        part = dim
    elif step == 1:
        part = _cut(record, dim, [start, length, total - start - length])[1]
    elif total % step == 0 and not is_frozen(dim):
        part, phase = _rows(record, dim, total // step)
        freeze(phase, f"{record.place} takes every {step}th entry of it")
    else:
        freeze(dim, f"{record.place} takes every {step}th entry of it")
        part = Atom(length, f"{record.place} takes every {step}th entry of it")
    record.put(out, [*value.dims[:at], part, *value.dims[at + 1 :]], value.silent)


@_rule("select")
def _select(record: Record, call: Call) -> None:
    _without(record, call, call.args[1])


@_rule("unbind")
def _unbind(record: Record, call: Call) -> None:
    _without(record, call, call.get(1, "dim", 0))


def _without(record: Record, call: Call, dim: int) -> None:
    value = record.value(call.args[0])
    at = dim % len(value.dims)
    freeze(value.dims[at], f"{record.place} picks single entries of it")
    for out in call.outputs:
        record.put(out, [*value.dims[:at], *value.dims[at + 1 :]], [*value.silent[:at], *value.silent[at + 1 :]])


@_rule("glu")
def _glu(record: Record, call: Call) -> None:
    value = record.value(call.args[0])
    at = call.get(1, "dim", -1) % len(value.dims)
    half = call.out.shape[at]
    first, second = _cut(record, value.dims[at], [half, half])
    unify(first, second)
    record.put(call.out, [*value.dims[:at], first, *value.dims[at + 1 :]], value.silent)


@_rule("constant_pad_nd")
def _pad(record: Record, call: Call) -> None:
    value = record.value(call.args[0])
    amounts, fill = call.args[1], call.get(2, "value", 0)
    name, args, kwargs = record.request
    asked = list(kwargs.get("pad", args[1] if len(args) > 1 else ())) if name == "pad" else []
    dims, silent = list(value.dims), list(value.silent)
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
        silent[at] = silent[at] and (fill is None or fill == 0)
    record.put(call.out, dims, silent)


# ------------------------------------------------------------------------------------------------ space


@_rule("max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d")
@_rule("adaptive_max_pool2d", "mkldnn_adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d")
@_rule("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d")
@_rule("reflection_pad2d", "replication_pad2d")
def _over_planes(record: Record, call: Call) -> None:
    _over_space(record, call, 2)


@_rule("avg_pool1d", "adaptive_avg_pool1d", "max_pool1d", "upsample_nearest1d", "upsample_linear1d")
def _over_lines(record: Record, call: Call) -> None:
    _over_space(record, call, 1)


def _over_space(record: Record, call: Call, rank: int) -> None:
    value = record.value(call.args[0])
    record.freeze(value.dims[-rank:], SPATIAL)
    for out in call.outputs:
        spatial = [Atom(size, SPATIAL) for size in out.shape[-rank:]]
        record.put(out, [*value.dims[:-rank], *spatial], [*value.silent[:-rank], *[False] * rank])


@_rule("pixel_shuffle")
def _pixel_shuffle(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    channels, inside = _rows(record, value.dims[-3], out.shape[-3])
    freeze(inside, SPATIAL)
    record.freeze(value.dims[-2:], SPATIAL)
    spatial = [Atom(size, SPATIAL) for size in out.shape[-2:]]
    record.put(out, [*value.dims[:-3], channels, *spatial], [*value.silent[:-3], value.silent[-3], False, False])


@_rule("pixel_unshuffle")
def _pixel_unshuffle(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    record.freeze(value.dims[-2:], SPATIAL)
    channels = product([value.dims[-3], Atom(call.args[1] ** 2, SPATIAL)])
    spatial = [Atom(size, SPATIAL) for size in out.shape[-2:]]
    record.put(out, [*value.dims[:-3], channels, *spatial], [*value.silent[:-3], value.silent[-3], False, False])


@_rule("im2col")
def _im2col(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    record.freeze(value.dims[-2:], SPATIAL)
    channels = product([value.dims[-3], Atom(math.prod(call.args[1]), KERNEL)])
    silent = [*value.silent[:-3], value.silent[-3], False]
    record.put(out, [*value.dims[:-3], channels, Atom(out.shape[-1], SPATIAL)], silent)


# ------------------------------------------------------------------------------------------------ indexing, order


@_rule("index")
def _index(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    at = [d for d, index in enumerate(call.args[1]) if index is not None]
    indices = [call.args[1][d] for d in at]
    reason = f"{record.place} looks entries of it up by index"
    masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
    if masks or at != list(range(at[0], at[-1] + 1)):
        record.freeze(value.dims, reason)
        record.put(out, _opaque(out, reason), False)
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


@_rule("index_select")
def _index_select(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    at = call.args[1] % len(value.dims)
    reason = f"{record.place} looks entries of it up by index"
    freeze(value.dims[at], reason)
    record.put(out, [*value.dims[:at], Atom(out.shape[at], reason), *value.dims[at + 1 :]], value.silent)


@_rule("embedding")
def _embedding(record: Record, call: Call) -> None:
    table, indices = call.args[:2]
    value = record.value(table)
    freeze(value.dims[0], f"it counts the entries of the table looked up in {record.place}")
    record.weigh(table, produced=[1], contracted=[])
    record.put(call.out, [*record.dims(indices), value.dims[1]], [*[False] * indices.dim(), value.silent[1]])


@_rule("roll", "flip")
def _roll(record: Record, call: Call) -> None:
    value = record.value(call.args[0])
    moved = call.get(2, "dims", ()) if call.name == "roll" else call.args[1]
    record.freeze([value.dims[d] for d in _wrap(moved, len(value.dims))], POSITIONS)
    record.put(call.out, value.dims, value.silent)


@_rule("as_strided_")
def _restride(record: Record, call: Call) -> None:
    """Only accepted as the new stride of a tensor with one long axis: entries stay where they are."""
    out, strides = call.out, call.args[2]
    long = [stride for size, stride in zip(out.shape, strides, strict=True) if size != 1]
    if [find(dim).size for dim in record.dims(out)] == list(call.args[1]) and long in ([], [1]):
        record.put(out, record.dims(out), record.value(out).silent)
    else:
        opaque(record, call)


@_rule("sort", "topk", "cumsum", "cumprod", "argsort", "triu", "tril")
def _ordered(record: Record, call: Call) -> None:
    value = record.value(call.args[0])
    record.freeze(value.dims, POSITIONS)
    for out in call.outputs:
        same = list(out.shape) == list(call.args[0].shape)
        record.put(out, value.dims if same else _opaque(out, POSITIONS), False)


# ------------------------------------------------------------------------------------------------ new tensors


@_rule("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full")
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


@_rule("arange", "linspace", "eye", "rand", "randn", "scalar_tensor", "normal", "randint", "randperm")
def _by_position(record: Record, call: Call) -> None:
    for out in call.outputs:
        record.put(out, _opaque(out, POSITIONS), False)


# ------------------------------------------------------------------------------------------------ the rest

#: Elementwise in effect, but without the tag.
UNTAGGED_POINTWISE = frozenset(
    ["where", "floor_divide", "masked_fill", "clamp", "hardsigmoid", "hardswish", "lerp", "addcmul", "mish", "softplus", "logical_not", "bitwise_and", "prelu", "_prelu_kernel", "dropout", "isnan"]
)


def opaque(record: Record, call: Call) -> None:
    """An operator without a rule: all its axes stay."""
    reason = f"{record.place} calls the operator {call.name!r}, for which there is no rule"
    for tensor in call.inputs:
        record.freeze(record.dims(tensor), reason)
    for out in call.outputs:
        record.put(out, _opaque(out, reason), False)
    record.unknown[call.name] += 1


def apply_rule(record: Record, call: Call, tags: Sequence[torch.Tag]) -> None:
    """Look up the rule of an operator and apply it."""
    record.begin(call)
    rule = RULES.get(call.name)
    if rule is not None:
        rule(record, call)
    elif torch.Tag.pointwise in tags or call.name.rstrip("_") in UNTAGGED_POINTWISE:
        pointwise(record, call)
    else:
        opaque(record, call)
