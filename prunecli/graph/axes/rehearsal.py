"""Rehearsal of the cut without data: the pruned forward must take the traced path, with the sizes that were predicted.

A number can lose its origin: ``range(n)``, ``0.5 * n``, ``math.log2(n)`` read an int unnoticed (see
`prunecli.graph.axes.ints`). Where such a number sizes a tensor the trace takes it for a literal and freezes; where it
decides how often a loop runs, which layer comes next or what a tensor is multiplied by, nothing notices. So the forward
is run again, without values, at half the widths, and every operator is held to the trace: which it is, the extents of
what it gives, the stored tensors and the numbers it is given. At the first difference the group behind it is looked for
by halving, frozen with what was seen and where, and all is inferred again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
from torch import Tensor

from prunecli.graph.axes.collect import Inference, infer
from prunecli.graph.axes.dry import DryFunctions, DryOperators, dry
from prunecli.graph.axes.record import Call, Record
from prunecli.graph.axes.rules.registry import words
from prunecli.graph.axes.terms import Atom, freeze, leaves
from prunecli.values.groups import AttributeConflictError, AttributeEdit, Bundle, Graph, common_parts

_ROUNDS = 3  # most rehearsals of one graph: groups that exclude each other cannot all be cut at once
#: Whether these are called depends on strides and on who runs the forward, not on the path it takes.
_MOVES = words("clone contiguous detach alias lift_fresh expand as_strided_")
_VIEWS = words("view _unsafe_view reshape _reshape_alias")
#: Operators whose int arguments are values; those of others are sizes, dimensions and places.
_FILLS = words("full fill_ full_like arange linspace")

#: Kept width by name, for groups that are cut together.
_Move: TypeAlias = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class _Observation:
    """The traits of one operator call that have to agree between trace and rehearsal.

    Attributes:
        name: name of the operator, the same for all kinds of view.
        shapes: shape of each output.
        stored: names of the stored tensors among the inputs.
        numbers: values among the arguments.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    stored: tuple[str, ...]
    numbers: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """The point at which a rehearsal left the trace.

    Attributes:
        at: number of the first step that differs.
        what: the difference, in words.
    """

    at: int
    what: str


class _DifferentError(Exception):
    """Ends a rehearsal at its first difference."""


def rehearse(record: Record, input_size: tuple[int, int, int]) -> Graph:
    """The graph of a trace, with every group frozen whose size would make the forward leave the traced path.

    Args:
        record: the finished trace; more of its axes may be frozen.
        input_size: channels, height, width of one image.
    """
    while True:
        inference = infer(record)
        found = _Rehearsal(record, inference, input_size).culprit()
        if found is None:
            return inference.graph
        name, reason = found
        freeze(inference.axes[name], reason)


class _Rehearsal:
    """Rehearsals of one graph."""

    def __init__(self, record: Record, inference: Inference, input_size: tuple[int, int, int]) -> None:
        self.record = record
        self.inference = inference
        self.graph = inference.graph
        self.input_size = input_size
        self.steps = [step for step in record.steps if step.call.name not in _MOVES]
        self.names = {key: names[0] for key, names in record.names.items()}
        self.seen = [_observe(step.call, self.names) for step in self.steps]
        self.terms = [[record.peek(out).dims for out in _results(step.call)] for step in self.steps]

    def culprit(self) -> tuple[str, str] | None:
        """The name of a group that cannot be cut as the trace predicts, with the reason; ``None`` without one."""
        for moves in self._rounds():
            difference = self._difference(moves)
            if difference is not None and self._difference([]) is None:
                name, seen = self._responsible(moves, difference)
                width, other = self.graph.group(name).width, next(move[name] for move in moves if name in move)
                place = self.steps[min(seen.at, len(self.steps) - 1)].place
                return name, (
                    f"{place} computes with its size where that cannot be followed: "
                    f"with {other} instead of {width}, {seen.what}"
                )
        return None

    def _rounds(self) -> Iterator[list[_Move]]:
        """Sets of groups to cut together, until each group has been cut once or never will be."""
        left = {group.name for group in self.graph.groups}
        for _ in range(_ROUNDS):
            moves: list[_Move] = []
            cut: set[str] = set()
            for tie in self.graph.all_ties():
                bundles = tie.selected(lambda bundle: left.isdisjoint(bundle.groups))
                assert bundles is not None, "every tie of a graph has a common share"
                names = {name for bundle in bundles for name in bundle.groups}
                rivals = {other for pair in self.graph.exclusive if names & set(pair) for other in pair}
                if names & left and (rivals - set(tie.groups)).isdisjoint(cut):
                    moves.append(self._resize(bundles))
                    cut |= names
            if not moves:
                return
            yield moves
            left.difference_update(cut)

    def _resize(self, bundles: Sequence[Bundle]) -> _Move:
        """Other widths for the groups of these bundles: half, or twice the width where half would leave one entry.

        Axes of one entry are no axes to torch (einsum drops them), and a wider net costs nothing without values.
        """
        widths = {name: self.graph.group(name).width for bundle in bundles for name in bundle.groups}
        parts = common_parts(bundles)
        fewer = [k for k in range(max(parts // 2, 1), parts) if all(w * k >= 2 * parts for w in widths.values())]
        share = fewer[0] if fewer else 2 * parts
        return {name: width * share // parts for name, width in widths.items()}

    def _responsible(self, moves: Sequence[_Move], difference: _Difference) -> tuple[str, _Difference]:
        """One group without which the forward follows the trace for longer, and the difference that the group makes.

        Groups at the place of the difference are suspected first; they are halved until one is left.
        """
        here = self._groups_at(difference.at)
        suspects = [move for move in moves if not here.isdisjoint(move)]
        if suspects and self._difference(suspects) is None:
            suspects = []
        pool = suspects or list(moves)
        good, bad = 0, len(pool)
        while bad - good > 1:
            middle = (good + bad) // 2
            seen = self._difference(pool[:middle])
            if seen is None:
                good = middle
            else:
                bad, difference = middle, seen
        name = next((name for name in pool[bad - 1] if name in here), next(iter(pool[bad - 1])))
        return name, difference

    def _groups_at(self, at: int) -> set[str]:
        """The groups that run through the tensors of a step."""
        call = self.steps[min(at, len(self.steps) - 1)].call
        values = [self.record.peek(tensor) for tensor in (*call.inputs, *call.outputs)]
        touched = {id(leaf) for value in values for dim in value.dims for leaf in leaves(dim)}
        return {name for name, axis in self.inference.axes.items() if id(axis) in touched}

    def _difference(self, moves: Iterable[_Move]) -> _Difference | None:
        """Run the forward with these groups at other widths."""
        kept = {name: width for move in moves for name, width in move.items()}
        try:
            edits = self.graph.solve(kept)
        except AttributeConflictError as conflict:
            return _Difference(at=0, what=str(conflict))
        return _Expected(self, kept, edits).run()


class _Expected:
    """One rehearsal: the steps as they should be with these widths, and the run that is compared with them."""

    def __init__(self, rehearsal: _Rehearsal, kept: Mapping[str, int], edits: Sequence[AttributeEdit]) -> None:
        self.rehearsal = rehearsal
        self.model = rehearsal.record.model
        self.kept = kept
        self.edits = edits
        self.rescaled = {(e.before, e.after) for e in edits if isinstance(e.before, float)}
        self.names = dict(rehearsal.names)
        self.extents: dict[int, int] = {}
        self.at = 0

    def run(self) -> _Difference | None:
        """The first difference; ``None`` without one."""
        record = self.rehearsal.record
        try:
            with dry(self.model, self.rehearsal.input_size, record.shapes) as dry_run:
                self._cut(dry_run.place)
                with DryOperators(dry_run.run, self.compare) as operators, DryFunctions(operators, dry_run):
                    self.model(dry_run.image)
        except _DifferentError as different:
            return _Difference(at=self.at, what=str(different))
        except Exception as error:  # a forward with wrong sizes may raise anything
            reason = str(error).strip().splitlines()
            return _Difference(at=self.at, what=f"it fails ({reason[0] if reason else type(error).__name__})")
        return _Difference(at=self.at, what="it ends early") if self.at < len(self.rehearsal.steps) else None

    def _cut(self, place: torch.device) -> None:
        """Put tensors of the new shapes without values, and the edits, into the model for the time of a dry run."""
        record, tensors = self.rehearsal.record, self.rehearsal.graph.tensors
        new: dict[int, Tensor] = {}
        for name, tensor in record.homes.items():
            shape = [size.evaluate(self.kept) for size in tensors[name]]
            if shape != list(tensor.shape) and id(tensor) not in new:
                smaller = torch.empty(shape, dtype=tensor.dtype, device=place)
                new[id(tensor)] = smaller.requires_grad_(tensor.requires_grad)  # how a matmul is folded depends on it
        self.names.update((id(smaller), self.names[key]) for key, smaller in new.items())
        self.cut = new
        for module in record.modules.values():
            for store in (module.__dict__, *module.__dict__.values()):
                if isinstance(store, dict | list) and store:
                    _substitute(store, new)
        for edit in self.edits:
            if "." not in edit.name:
                own = record.modules[edit.module].__dict__
                own[edit.name] = type(own[edit.name])(edit.after)

    def compare(self, call: Call) -> None:
        """Compare one call with its step. Raises _DifferentError."""
        if call.name in _MOVES:
            return
        if self.at == len(self.rehearsal.steps):
            raise _DifferentError("it goes on for longer")
        found, before = _observe(call, self.names), self.rehearsal.seen[self.at]
        shapes = tuple(tuple(map(self._extent, dims)) for dims in self.rehearsal.terms[self.at])
        if found.name != before.name:
            raise _DifferentError(f"the operator {found.name!r} comes instead of {before.name!r}")
        if found.shapes != shapes:
            raise _DifferentError(f"{found.name!r} gives {_text(found.shapes)} instead of {_text(shapes)}")
        if found.stored != before.stored:
            raise _DifferentError(f"{found.name!r} takes {_text(found.stored)} instead of {_text(before.stored)}")
        for after, number in zip_longest(found.numbers, before.numbers):
            if after != number and (number, after) not in self.rescaled:
                raise _DifferentError(f"{found.name!r} is given the number {after} instead of {number}")
        self.at += 1

    def _extent(self, term: Atom) -> int:
        """The size of a term with the kept widths."""
        known = self.extents.get(id(term))
        if known is None:
            known = self.extents[id(term)] = self.rehearsal.inference.sizes.of(term).evaluate(self.kept)
        return known


def _observe(call: Call, names: Mapping[int, str]) -> _Observation:
    """The traits of a call to compare; ``names`` holds those of stored tensors by identity."""
    takes_ints = call.name in _FILLS or torch.Tag.pointwise in getattr(call.function, "tags", ())
    kinds = (int, float) if takes_ints else (float,)
    values = (*call.args, *call.kwargs.values())
    return _Observation(
        name="view" if call.name in _VIEWS else call.name,
        shapes=tuple(tuple(out.shape) for out in _results(call)),
        stored=tuple(names[id(t)] for t in call.inputs if id(t) in names),
        numbers=tuple(value for value in values if isinstance(value, kinds)),
    )


def _results(call: Call) -> list[Tensor]:
    """The outputs of a call without the by-products of norms, which differ with the device."""
    return call.outputs[:1] if "norm" in call.name else call.outputs


def _text(parts: Sequence[Any]) -> str:
    return ", ".join(map(str, parts)) or "nothing"


def _substitute(store: dict[Any, Any] | list[Any], new: Mapping[int, Tensor]) -> None:
    """Replace the tensors of a container by their new ones, in place."""
    if isinstance(store, dict):
        store.update({key: new[id(value)] for key, value in store.items() if id(value) in new})
    else:
        store[:] = [new.get(id(value), value) for value in store]
