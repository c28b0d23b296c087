"""Policy beside mechanism: which axes stay although the trace could follow them, each with its reason."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from prunecli.axes.ints import Attribute, Extent, Fact, Number, attributes_in, axes_in
from prunecli.axes.record import Equation, Record
from prunecli.axes.terms import freeze, is_frozen, leaves


def freeze_statistics(record: Record) -> None:
    """A statistic over an axis is a norm where the module scales that axis by a parameter of its own; else freeze."""
    kept = []
    for path, dim in record.norms:
        module = record.model.get_submodule(path)
        own = [p for p in module.parameters(recurse=False) if p is not None]
        scaled = {id(leaf) for p in own for term in record.dims(p) for leaf in leaves(term)}
        is_norm = hasattr(module, "normalized_shape") or hasattr(module, "num_groups")
        plain = not own and is_norm
        if (is_norm or next(module.children(), None) is None) and (
            plain or all(id(leaf) in scaled or leaf.reason for leaf in leaves(dim))
        ):
            kept.append((path, dim))
        else:
            freeze(dim, f"module {path!r} takes a statistic over it")
    record.norms = kept


def freeze_rebuilt(record: Record) -> None:
    """Freeze buffers that their module computes again when it is converted to another dtype: a cut would be undone.

    Rotary embeddings do so, with tables that have to stay in single precision. Found by trying it on a copy.
    """
    for path, module in record.model.named_modules():
        buffers = {name: b for name, b in module.named_buffers(recurse=False) if b.is_floating_point()}
        if buffers and type(module)._apply is not nn.Module._apply:  # noqa: SLF001 - what a module overrides to do that
            converted = dict(copy.deepcopy(module).half().named_buffers(recurse=False))
            for name, buffer in buffers.items():
                if name not in converted or converted[name].dtype is not torch.half:
                    record.freeze(record.dims(buffer), f"module {path!r} computes it anew when its dtype changes")


def settle(record: Record) -> None:
    """Freeze what attributes and extents hold in place, until nothing changes.

    A size whose very value is used (a comparison with a literal, a float) cannot change. An attribute that sizes a
    frozen axis cannot change, so what else it sizes cannot either.
    """
    pinned: set[Attribute] = set()
    for expression in record.ledger.pins:
        pinned |= attributes_in(expression)
        record.freeze(axes_in(expression), "its size enters a computation as a number")
    for fact in record.ledger.facts:
        if _is_threshold(fact):
            pinned |= attributes_in(fact.left)
            record.freeze(axes_in(fact.left), "its size is compared with a number in the code")
    while True:
        before = (len(pinned), _count_free(record.equations))
        for equation in record.equations:
            _settle_equation(record, equation, pinned)
        if (len(pinned), _count_free(record.equations)) == before:
            return


def _is_threshold(fact: Fact) -> bool:
    """``size >= 8``: which sizes keep the outcome is a matter of the program, not of the axis. ``size > 0`` is none."""
    if not isinstance(fact.right, Number) or fact.comparison in {"eq", "ne"}:
        return False
    always = isinstance(fact.left, Extent | Attribute) and (fact.comparison, fact.right.value) in {
        ("gt", 0),
        ("le", 0),
        ("ge", 1),
        ("lt", 1),
    }
    return not always


def _count_free(equations: Iterable[Equation]) -> int:
    return sum(1 for e in equations for leaf in (*e.axes, *axes_in(e.expression)) if leaf.reason is None)


def _settle_equation(record: Record, equation: Equation, pinned: set[Attribute]) -> None:
    used = attributes_in(equation.expression)
    parts_fixed = all(map(is_frozen, equation.parts))
    if used <= pinned and all(map(is_frozen, axes_in(equation.expression))):
        what = ", ".join(sorted(map(str, used))) or "another axis"
        record.freeze(equation.parts, f"its size is given by {what}, which cannot change")
    elif parts_fixed and isinstance(equation.expression, Attribute):
        pinned.add(equation.expression)
    elif parts_fixed and isinstance(equation.expression, Extent):
        freeze(equation.expression.atom, "its size equals that of an axis that cannot change")
