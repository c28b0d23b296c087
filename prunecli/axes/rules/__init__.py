"""What each aten operator does to axes: one rule per family, found by operator name in a table.

A rule reads the terms of the inputs, states what is the same axis (`unify`), freezes what it cannot follow, and records
the terms of the outputs. It also says on which output dimensions silenced channels are still zero (`Value.silent`):
only then may a later contraction or sum run over them, and the cut net equal the silenced one.
"""

from __future__ import annotations

from prunecli.axes.record import Call, Record
from prunecli.axes.rules import blocks, contraction, layout, lookup, space, statistics
from prunecli.axes.rules.contraction import sdpa
from prunecli.axes.rules.elementwise import is_elementwise, pointwise
from prunecli.axes.rules.registry import RULES, opaque
from prunecli.axes.rules.statistics import layer_norm

__all__ = ["apply_rule", "blocks", "contraction", "layer_norm", "layout", "lookup", "sdpa", "space", "statistics"]


def apply_rule(record: Record, call: Call) -> None:
    """Look up the rule of an operator and apply it; one without a rule freezes what it touches."""
    record.begin(call)
    rule = RULES.get(call.name)
    if rule is not None:
        rule(record, call)
    elif is_elementwise(call.function):
        pointwise(record, call)
    else:
        opaque(record, call)
