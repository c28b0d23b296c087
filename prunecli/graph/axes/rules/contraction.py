"""Matrix products, convolutions and attention: where axes are produced and read."""

from __future__ import annotations

from torch import Tensor

from prunecli.graph.axes.record import KERNEL, Call, DefaultScale, Record, TensorAxes
from prunecli.graph.axes.rules.registry import SPATIAL, rows, rule, silent_at
from prunecli.graph.axes.terms import Atom, freeze, is_frozen, product, unify


@rule("mm")
def _mm(record: Record, call: Call) -> None:
    _matmul(record, call, call.args[0], call.args[1], None)


@rule("addmm")
def _addmm(record: Record, call: Call) -> None:
    _matmul(record, call, call.args[1], call.args[2], call.args[0])


@rule("bmm")
def _bmm(record: Record, call: Call) -> None:
    _matmul(record, call, call.args[0], call.args[1], None)


@rule("baddbmm")
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
        record.head_dims.extend((x.dims[-1], y.dims[-1]))
    dims = [*x.dims[:-1], y.dims[-1]]
    record.cost(call.name, [*dims, x.dims[-1]])
    silent = [x.silent[-2], y.silent[-1]]
    if batched:
        silent.insert(0, x.silent[0] or y.silent[0])
    if bias is not None:
        for dim, own in zip(reversed(dims), reversed(record.dims(bias)), strict=False):
            unify(dim, own)
        silent = [flag and silent_at(record, bias, call.out, d) for d, flag in enumerate(silent)]
    record.put(call.out, dims, silent)


@rule("mv")
def _mv(record: Record, call: Call) -> None:
    matrix, vector = call.args[:2]
    record.contract(matrix, 1, vector, 0)
    record.weigh(matrix, produced=[0], contracted=[1])
    record.weigh(vector, produced=[], contracted=[0])
    record.put(call.out, record.dims(matrix)[:1], record.value(matrix).silent[:1])


@rule("dot")
def _dot(record: Record, call: Call) -> None:
    record.contract(call.args[0], 0, call.args[1], 0)
    record.put(call.out, [], silent=True)


@rule("convolution", "_convolution", "mkldnn_convolution")
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
    if _is_pointwise(call):
        # Every position on its own, so nothing here fixes these axes. CoaT mixes tokens so, channel by channel.
        spatial = list(x.dims[2:])
        kept = [flag and bias is None for flag in x.silent[2:]]
    else:
        along = f"a convolution in {record.place} slides along it"
        reasons = [SPATIAL if is_frozen(dim) else along for dim in x.dims[2:]]
        for dim, reason in zip(x.dims[2:], reasons, strict=True):
            freeze(dim, reason)
        spatial = [Atom(size, reason) for size, reason in zip(call.out.shape[2:], reasons, strict=True)]
        kept = [False] * len(spatial)
    # The batch counts: where windows or heads were folded into it, it is not one image.
    record.cost("conv", [x.dims[0], *(x.dims[2:] if transposed else spatial), *w.dims])
    record.put(call.out, [x.dims[0], produced, *spatial], [False, silent, *kept])


def _is_pointwise(call: Call) -> bool:
    """Whether a convolution maps each position by itself: kernel and stride 1, no padding, not transposed."""
    weight, stride, padding = call.args[1], call.args[3], call.args[4]
    alone = all(size == 1 for size in weight.shape[2:]) and not any(padding)
    return alone and all(step == 1 for step in stride) and not call.args[6]


def _grouped(record: Record, x: TensorAxes, w: TensorAxes, groups: int, *, transposed: bool) -> tuple[Atom, bool]:
    """A grouped convolution: its output channels are groups x what each group writes.

    Depthwise convolution is the case of one input channel per group. A convolution's weight is [groups * out, in, …],
    a transposed one's [groups * in, out, …].
    """
    outer, inside_w = rows(record, w.dims[0], groups)
    group_x, inside_x = rows(record, x.dims[1], groups)
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


@rule("scaled_dot_product_attention")
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
        record.default_scales.append(
            DefaultScale(module=record.module, call=call, query=query, key=key, width=q.dims[-1])
        )
    record.cost("sdpa.qk", [*batch, q.dims[-2], q.dims[-1], k.dims[-2]])
    record.cost("sdpa.av", [*batch, q.dims[-2], v.dims[-2], v.dims[-1]])
    silent = [*v.silent[: len(batch)], False, v.silent[-1]]
    for out in call.outputs[:1]:
        record.put(out, [*batch, q.dims[-2], v.dims[-1]], silent)
