"""Attributes that state a size nobody computes with: ``in_features``, ``num_features``, ``feature_info``.

Rule: attribute ``in_features`` (``in_chs`` …) of a module follows the dimension of that size among the tensors the
module was called with, ``out_features`` … among those it returned, ``num_features``, ``dim`` … among both; and only
where exactly one cuttable term has that size and the program computes nothing from the attribute. A model's own
``num_features`` and ``embed_dim`` are looked for in what its ``forward_features`` returned, ``head_hidden_size`` in
what its classifier was called with, and ``feature_info[i]["num_chs"]`` in what the module named there returned. An
attribute of two possible meanings is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import nn

from prunecli.graph.axes.ints import Attribute, attributes_in
from prunecli.graph.axes.record import ModuleCall, Record, TensorAxes
from prunecli.graph.axes.solve import NamedSize
from prunecli.graph.axes.terms import Atom, find, is_frozen
from prunecli.values.groups import Size

_OF_INPUT = frozenset({"in_features", "in_channels", "in_chs", "in_dim"})
_OF_OUTPUT = frozenset({"out_features", "out_channels", "out_chs", "out_dim"})
_OF_BOTH = frozenset({"num_features", "num_channels", "embed_dim", "dim", "channels"})
_OF_FEATURES = frozenset({"num_features", "embed_dim"})
_OF_CLASSIFIER = frozenset({"head_hidden_size"})


def named_sizes(record: Record, size_of: Callable[[Atom], Size]) -> list[NamedSize]:
    """The stated sizes of a model that follow one cuttable dimension each.

    Args:
        record: the finished trace.
        size_of: function from a term to its size over kept widths.
    """
    read = _read_by_the_program(record)
    found = []
    for attribute, value in record.attributes.items():
        if attribute.index is None and attribute not in read:
            term = _only_term(_candidates(record, attribute), value)
            if term is not None:
                found.append(NamedSize(module=attribute.module, name=attribute.name, before=value, size=size_of(term)))
    return [*found, *_feature_info(record, size_of)]


def _read_by_the_program(record: Record) -> set[Attribute]:
    """Attributes that size or decide something (``if self.dim != self.dim_out``), which the solver follows instead."""
    expressions = [equation.expression for equation in record.equations] + list(record.ledger.pins)
    expressions += [side for fact in record.ledger.facts for side in (fact.left, fact.right)]
    return {attribute for expression in expressions for attribute in attributes_in(expression)}


def _candidates(record: Record, attribute: Attribute) -> Sequence[TensorAxes]:
    """The tensors among whose dimensions an attribute's size is looked for."""
    name = attribute.name
    if not attribute.module:
        if name in _OF_FEATURES:
            return record.features
        return _classifier_inputs(record) if name in _OF_CLASSIFIER else ()
    call = record.module_calls.get(attribute.module, ModuleCall())
    if name in _OF_INPUT:
        return call.inputs
    if name in _OF_OUTPUT:
        return call.outputs
    return [*call.inputs, *call.outputs] if name in _OF_BOTH else ()


def _classifier_inputs(record: Record) -> list[TensorAxes]:
    """The tensors with which the classifier was called; empty without a classifier."""
    get = getattr(record.model, "get_classifier", None)
    classifier = get() if callable(get) else None
    if isinstance(classifier, tuple | list):
        classifier = classifier[0]
    paths = (path for path, module in record.modules.items() if module is classifier)
    return record.module_calls.get(next(paths, ""), ModuleCall()).inputs if isinstance(classifier, nn.Module) else []


def _feature_info(record: Record, size_of: Callable[[Atom], Size]) -> Iterator[NamedSize]:
    """The channel counts in timm's ``feature_info``."""
    info = getattr(record.model, "feature_info", None)
    for i, entry in enumerate(info if isinstance(info, list) else ()):
        if isinstance(entry, Mapping) and isinstance(entry.get("num_chs"), int):
            call = record.module_calls.get(entry.get("module", ""), ModuleCall())
            term = _only_term(call.outputs, entry["num_chs"])
            if term is not None:
                yield NamedSize(
                    module="", name=f"feature_info.{i}.num_chs", before=entry["num_chs"], size=size_of(term)
                )


def _only_term(values: Iterable[TensorAxes], size: int) -> Atom | None:
    """The one cuttable term of this size among the dimensions of ``values``; ``None`` for no such term or several."""
    terms = {id(find(d)): find(d) for v in values for d in v.dims if find(d).size == size and not is_frozen(d)}
    return next(iter(terms.values())) if len(terms) == 1 else None
