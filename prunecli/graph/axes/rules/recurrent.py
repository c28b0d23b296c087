"""LSTM, GRU and plain recurrent networks, each call as one: unrolled, they are very many operators.

A layer's weights are [gates * hidden, input] and [gates * hidden, hidden]; what it gives is the hidden axis, once for
each direction. A hidden channel whose rows and columns are zero stays zero through all steps, if it starts so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunecli.graph.axes.record import Call, Record
from prunecli.graph.axes.rules.registry import opaque, rows, rule
from prunecli.graph.axes.terms import Atom, concat, freeze, unify

#: Calls of ``torch`` by the rows of weights that one hidden channel has.
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent_outputs(args: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """The outputs of a call without values: output, last hidden state, for an LSTM the last cell state.

    Args:
        args: positional arguments of the call.

    Returns:
        ``None`` for packed sequences, whose call is another one.
    """
    if len(args) != 9:
        return None
    x, states, bidirectional = args[0], _states(args), args[7]
    out = x.new_empty((*x.shape[:-1], states[0].shape[-1] * (2 if bidirectional else 1)))
    return out, *map(torch.empty_like, states)


def _states(args: Sequence[Any]) -> list[Tensor]:
    """The initial states of a call: hidden, and for an LSTM cell."""
    return list(args[1]) if isinstance(args[1], tuple | list) else [args[1]]


def _is_plain(args: Sequence[Any]) -> bool:
    """Whether a call has neither packed sequences nor projected hidden states, which take one weight more."""
    return len(args) == 9 and len(args[2]) == args[4] * (2 if args[7] else 1) * (4 if args[3] else 2)


@rule(*GATES)
def recurrent(record: Record, call: Call) -> None:
    """The rule of recurrent calls.

    Args:
        record: the trace so far.
        call: the call, with arguments ``(x, states, weights, has_biases, layers, dropout, train, bidirectional,
            batch_first)``.
    """
    if not _is_plain(call.args):
        opaque(record, call)
        return
    x, _, weights, has_biases, layers, _, _, bidirectional, _ = call.args
    states = _states(call.args)
    directions, per_layer = (2 if bidirectional else 1), (4 if has_biases else 2)
    value = record.value(x)
    inputs, silent = value.dims[-1], value.silent[-1]
    hidden = record.dims(states[0])[-1]
    for state in states:
        unify(record.dims(state)[-1], hidden)
    gates = Atom(GATES[call.name], f"it counts the gates of {record.place}")
    starts_silent = all(record.value(state).silent[-1] for state in states)
    for layer in range(layers):
        for direction in range(directions):
            at = (layer * directions + direction) * per_layer
            own = weights[at : at + per_layer]
            for weight in own:
                outer, inside = rows(record, record.dims(weight)[0], GATES[call.name])
                unify(outer, gates)
                unify(inside, hidden)
            _reads(record, call, own[0], inputs, silent=silent)
            _reads(record, call, own[1], hidden, silent=starts_silent)
        inputs, silent = concat([hidden] * directions), starts_silent
    if not starts_silent:
        freeze(hidden, f"{record.place} starts from states that are not zero")
    out, *last = call.outputs
    record.put(out, [*value.dims[:-1], inputs], [*[False] * (len(value.dims) - 1), silent])
    for state in last:
        record.put(state, record.dims(states[0]), [False, False, silent])


def _reads(record: Record, call: Call, weight: Tensor, read: Atom, *, silent: bool) -> None:
    """Record the use of a weight ``[gates * hidden, read]`` in every step of every sequence."""
    value = record.value(weight)
    unify(value.dims[1], read)
    if not (silent or value.silent[1]):
        freeze(read, f"{record.place} sums over it where silenced channels are not zero")
    record.weigh(weight, produced=[0], contracted=[1])
    record.cost(call.name, [*record.dims(call.args[0])[:-1], *value.dims])
