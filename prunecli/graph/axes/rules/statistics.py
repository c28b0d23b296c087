"""Norms, softmax and reductions: operators whose result depends on how many entries an axis has."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prunecli.graph.axes.record import Call, Record
from prunecli.graph.axes.rules.elementwise import pointwise
from prunecli.graph.axes.rules.registry import BY_PRODUCT, rows, rule, unrelated, wrap
from prunecli.graph.axes.terms import Atom, find, freeze, is_frozen, unify


def _affine_silent(record: Record, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a norm's output is zero in silenced channels: if its scale is, and its shift is or does not exist."""
    return weight is not None and all(record.value(weight).silent) and (bias is None or all(record.value(bias).silent))


@rule(
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
    silent = False
    if not has_statistics or trains:
        record.normalise([*x.dims[:1], *x.dims[2:]])
        # What is zero throughout is zero minus its mean; no scale changes that.
        silent = x.silent[1] and (call.args[2] is None or all(record.value(call.args[2]).silent))
    silent = silent or _affine_silent(record, call.args[1], call.args[2])
    first, *rest = call.outputs
    record.put(first, x.dims, [d == 1 and silent for d in range(first.dim())])
    for out in rest:
        record.put(
            out, [x.dims[1]] if list(out.shape) == [find(x.dims[1]).size] else unrelated(out, BY_PRODUCT), silent=False
        )


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
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
        record.put(out, unrelated(out, BY_PRODUCT), silent=False)


@rule("native_group_norm")
def _group_norm(record: Record, call: Call) -> None:
    x = record.value(call.args[0])
    weight, bias, groups = call.args[1], call.args[2], call.args[6]
    for tensor in (weight, bias):
        if tensor is not None:
            unify(record.dims(tensor)[0], x.dims[1])
    # Whole groups may leave as well (``num_groups`` then follows): the statistics of the others stay as they are.
    _, inside = rows(record, x.dims[1], groups)
    record.normalise([inside])
    silent = _affine_silent(record, weight, bias)
    first, *rest = call.outputs
    record.put(first, x.dims, [d == 1 and silent for d in range(first.dim())])
    for out in rest:
        record.put(out, unrelated(out, BY_PRODUCT), silent=False)


@rule("_softmax", "softmax", "_log_softmax", "_safe_softmax", "log_softmax")
def _softmax(record: Record, call: Call) -> None:
    value = record.value(call.args[0])
    freeze(value.dims[call.args[1]], f"{record.place} takes a softmax over it")
    record.put(call.out, value.dims, silent=False)


#: Statistics that a norm written out in Python takes over the axis it then scales.
_NORM_STATISTICS = frozenset({"mean", "var", "std", "var_mean", "std_mean"})


def _reduce(record: Record, call: Call, dims: int | Sequence[int] | None, *, zeros_vanish: bool) -> None:
    value = record.value(call.args[0])
    gone = set(wrap(dims, len(value.dims)))
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


@rule("sum")
def _sum(record: Record, call: Call) -> None:
    _reduce(record, call, call.get(1, "dim"), zeros_vanish=True)


@rule("linalg_vector_norm")
def _vector_norm(record: Record, call: Call) -> None:
    order = call.get(1, "ord", 2)
    _reduce(record, call, call.get(2, "dim"), zeros_vanish=order is None or order > 0)


@rule("norm")
def _norm(record: Record, call: Call) -> None:
    _reduce(record, call, call.get(2, "dim"), zeros_vanish=False)


@rule("mean", "amax", "amin", "argmax", "argmin", "prod", "var", "std", "var_mean", "std_mean", "logsumexp")
@rule("any", "all", "median", "count_nonzero")
def _statistic(record: Record, call: Call) -> None:
    dims = call.get(1, "dim")
    _reduce(record, call, None if isinstance(dims, bool) else dims, zeros_vanish=False)


@rule("max", "min")
def _extreme(record: Record, call: Call) -> None:
    other = call.get(1, "dim")
    if isinstance(other, Tensor):
        pointwise(record, call)
    else:
        _reduce(record, call, other, zeros_vanish=False)
