"""Rules for aten operators: how each family of operators maps the axes of inputs to outputs, by operator name.

A rule reads the terms of the inputs, unites those that are the same axis (`unify`), freezes what it cannot follow, and
records the terms of the outputs. It also records on which output dimensions silenced channels are still zero
(`TensorAxes.silent`): only then may a later contraction or sum run over them, and the cut net equal the silenced one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prunecli.graph.axes.record import Call, Record
from prunecli.graph.axes.rules import blocks, contraction, layout, lookup, space, statistics
from prunecli.graph.axes.rules.elementwise import pointwise
from prunecli.graph.axes.rules.recurrent import GATES, recurrent_outputs
from prunecli.graph.axes.rules.registry import RULES, opaque
from prunecli.graph.axes.shapes import is_elementwise

__all__ = ["WHOLE_CALLS", "apply_rule", "blocks", "contraction", "layout", "lookup", "run_whole", "space", "statistics"]

#: Python-level calls recorded as one, whatever they are made of on this device and torch version.
WHOLE_CALLS = frozenset({"scaled_dot_product_attention", "rms_norm", *GATES})


def run_whole(function: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The outputs of one of `WHOLE_CALLS`, in shape and dtype.

    Args:
        function: the Python-level function.
        name: the name under which the call is recorded.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    outputs = recurrent_outputs(args) if name in GATES else None
    return function(*args, **kwargs) if outputs is None else outputs


def apply_rule(record: Record, call: Call) -> None:
    """Look up the rule of an operator and apply it; an operator without a rule freezes its inputs and outputs.

    Args:
        record: the trace so far.
        call: the call, after it ran.
    """
    record.begin(call)
    rule = RULES.get(call.name)
    if rule is not None:
        rule(record, call)
    elif is_elementwise(call.function):
        pointwise(record, call)
    else:
        opaque(record, call)
