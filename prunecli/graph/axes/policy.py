"""Policy beside mechanism: which axes stay although the trace could follow them, each with its reason."""

from __future__ import annotations

import copy

import torch
from torch import nn

from prunecli.graph.axes.ints import axes_in
from prunecli.graph.axes.record import Record
from prunecli.graph.axes.terms import freeze, leaves


def freeze_statistics(record: Record) -> None:
    """Freeze axes over which a statistic is taken, unless it is a norm: its module scales them by its own parameter.

    Args:
        record: the finished trace; its ``norms`` are reduced to those that stay cuttable.
    """
    kept = []
    for path, dim in record.norms:
        module = record.modules[path]
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

    Args:
        record: the finished trace.
    """
    for path, module in record.modules.items():
        if type(module)._apply is nn.Module._apply:  # noqa: SLF001 - what a module overrides to do that
            continue
        buffers = {name: b for name, b in module.named_buffers(recurse=False) if b.is_floating_point()}
        if buffers:
            converted = dict(copy.deepcopy(module).half().named_buffers(recurse=False))
            for name, buffer in buffers.items():
                if name not in converted or converted[name].dtype is not torch.half:
                    record.freeze(record.dims(buffer), f"module {path!r} computes it anew when its dtype changes")


def freeze_numbers(record: Record) -> None:
    """Freeze axes whose very size is used: in a float, as an index, compared with a literal for equality.

    Args:
        record: the finished trace.
    """
    for expression in record.ledger.pins:
        record.freeze(axes_in(expression), "its size enters a computation as a number")
