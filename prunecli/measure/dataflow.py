"""Dataflow of a forward pass: the calls of modules, what they return, and when that is read.

Time is counted in operators. A *value* is a piece of memory: a tensor and its views are one value, so that writing in
place and reading through a view are seen. Values are held weakly: no activation outlives its use.

The pass is watched below the level of Python functions (``TorchDispatchMode``), because a custom autograd function
hides what it reads from ``TorchFunctionMode``. Reading a shape is no operator, so it does not count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunecli.models.layers import evaluation_mode
from prunecli.models.outputs import tensors_of
from prunecli.models.tensors import named_tensors
from prunecli.values.groups import module_of

Forward = Callable[..., Any]


@contextmanager
def replaced_forwards(model: nn.Module, forwards: Mapping[str, Forward]) -> Iterator[None]:
    """While this is open, modules answer with other functions; their attributes, hooks and types stay as they are.

    Args:
        model: the net that holds the modules.
        forwards: function that stands in for ``forward``, by module path.
    """
    places = {path: vars(model.get_submodule(path)) for path in forwards}
    before = {path: place["forward"] for path, place in places.items() if "forward" in place}
    for path, forward in forwards.items():
        places[path]["forward"] = forward
    try:
        yield
    finally:
        for path, place in places.items():
            del place["forward"]
            place.update({"forward": before[path]} if path in before else {})


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a module.

    Attributes:
        path: path of the module.
        place: place of the call in ``Dataflow.calls``.
        begin: number of operators that ran before the call.
        end: number of operators that had run when it returned.
        inner: number of calls inside it; these follow it in ``Dataflow.calls``.
        outputs: numbers of the values among what it returned.
        plain: whether it returned nothing but tensors and numbers in containers that can be walked.
        repeatable: whether handing out a copy of what it returned has the effect of the call: that is plain, each value
            is new and there once, and the call wrote to nothing that was there before.
    """

    path: str
    place: int
    begin: int
    end: int
    inner: int
    outputs: tuple[int, ...]
    plain: bool
    repeatable: bool


@dataclass(frozen=True, kw_only=True)
class Skip:
    """Calls that need not run again.

    Attributes:
        needed: paths of the modules whose outputs are read by what still runs.
        unneeded: paths of the other modules; of their outputs nothing but the shapes can matter.
    """

    needed: tuple[str, ...]
    unneeded: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator that ran.

    Attributes:
        reads: numbers of the values that it was given.
        makes: numbers of the values that it returned or changed.
        writes: numbers of the values that it changed in place.
    """

    reads: frozenset[int]
    makes: frozenset[int]
    writes: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Dataflow:
    """Dataflow of one forward pass in evaluation mode (made by ``trace``).

    Attributes:
        calls: calls of modules in the order in which they began.
        operators: operators in the order in which they ran.
        outputs: numbers of the values that the net returned.
        tensors: number of the value of each parameter, buffer and tensor attribute, by name.
        from_images: numbers of the values that depend on the images.
    """

    calls: tuple[Call, ...]
    operators: tuple[Operator, ...]
    outputs: frozenset[int]
    tensors: Mapping[str, int]
    from_images: frozenset[int]

    @cached_property
    def called_once(self) -> Mapping[str, Call]:
        """The one call of each module that is called exactly once, by path."""
        counts = Counter(call.path for call in self.calls)
        return {call.path: call for call in self.calls if counts[call.path] == 1}

    def overwritten(self, call: Call) -> bool:
        """Whether something writes in place, after a call, into what the call returned."""
        return any(not operator.writes.isdisjoint(call.outputs) for operator in self.operators[call.end :])

    def reads_of(self, names: Collection[str]) -> tuple[int, ...]:
        """The times at which an operator reads one of these tensors, ascending.

        Args:
            names: names of parameters, buffers and tensor attributes.
        """
        values = {self.tensors[name] for name in names}
        return tuple(at for at, operator in enumerate(self.operators) if not values.isdisjoint(operator.reads))

    def first_use(self, names: Collection[str]) -> float:
        """The time before which no tensor of these names can have had an effect; infinite without names.

        A tensor counts as used when the module that holds it is called, or the nearest module around that is called;
        where an operator reads it even earlier, then.

        Args:
            names: names of parameters, buffers and tensor attributes.
        """
        begins: dict[str, int] = {}
        for call in self.calls:
            begins.setdefault(call.path, call.begin)
        values = {self.tensors[name] for name in names}
        times: list[float] = [*self.reads_of(names)]
        for name in (name for name, value in self.tensors.items() if value in values):
            holder = module_of(name)
            while holder not in begins and holder:
                holder = module_of(holder)
            times.append(begins[holder])
        return min(times, default=math.inf)

    def skip(self, until: float) -> Skip:
        """The calls that are over before a time and can be answered from memory.

        They are as large as possible: a stage instead of its layers.

        Args:
            until: time in operators, as ``first_use`` gives it.
        """
        chosen = self._outermost(lambda call: call.end <= until and call.repeatable)
        live = self._live(chosen, until)
        return Skip(
            needed=tuple(call.path for call in chosen if not live.isdisjoint(call.outputs)),
            unneeded=tuple(call.path for call in chosen if live.isdisjoint(call.outputs)),
        )

    def hidden_before(self, waist: Call) -> tuple[str, ...]:
        """The modules whose outputs no longer matter behind a waist, as large as possible.

        What does not depend on the images is not among them: it may be read again (a table of positions).

        Args:
            waist: one of ``waists``.
        """

        def is_over(call: Call) -> bool:
            before = call.place + call.inner < waist.place
            return before and call.plain and bool(call.outputs) and self.from_images.issuperset(call.outputs)

        return tuple(call.path for call in self._outermost(is_over))

    def _outermost(self, fits: Callable[[Call], bool]) -> list[Call]:
        """The calls of modules called once that fit, without those inside another one that does."""
        chosen: list[Call] = []
        at = 0
        while at < len(self.calls):
            call = self.calls[at]
            found = call.path in self.called_once and fits(call)
            chosen += [call] if found else []
            at += 1 + (call.inner if found else 0)
        return chosen

    @cached_property
    def waists(self) -> tuple[Call, ...]:
        """The calls behind which all that still depends on the images depends on the one tensor that they returned.

        Of several calls that return the same tensor it is the outermost one. In a residual net these are the places
        where a residual sum is complete.
        """
        found: dict[int, Call] = {}
        for call in self.calls:
            alone = call.repeatable and len(call.outputs) == 1 and call.path in self.called_once
            if alone and call.end < len(self.operators) and self.crossing(call.end) == set(call.outputs):
                found.setdefault(call.end, call)
        return tuple(found[end] for end in sorted(found))

    def crossing(self, time: int) -> set[int]:
        """Numbers of the values that depend on the images, were there before a time and are read after it.

        Args:
            time: time in operators.
        """
        return {value for value, (made, read) in self._lifetimes.items() if made < time <= read}

    @cached_property
    def _lifetimes(self) -> dict[int, tuple[int, int]]:
        """When each value that depends on the images was made and last read; the net reads its outputs at the end."""
        made: dict[int, int] = {}
        read: dict[int, int] = dict.fromkeys(self.outputs, len(self.operators))
        for time in range(len(self.operators) - 1, -1, -1):
            for value in self.operators[time].reads:
                read.setdefault(value, time)
            made.update(dict.fromkeys(self.operators[time].makes, time))
        return {value: (made.get(value, -1), read[value]) for value in self.from_images & read.keys()}

    def _live(self, skipped: Collection[Call], until: float) -> set[int]:
        """Values that have to be right where these calls are skipped, followed backwards from the outputs.

        An operator before ``until`` that still runs, between two skipped calls, may get anything if nothing depends on
        it any more; one that returns no tensor hands a number to Python, on which everything may depend.
        """
        inside = {time for call in skipped for time in range(call.begin, call.end)}
        live = set(self.outputs)
        for time in range(len(self.operators) - 1, -1, -1):
            operator = self.operators[time]
            if time in inside:
                continue
            if time >= until or not operator.makes or not live.isdisjoint(operator.makes):
                live |= operator.reads
        return live


@torch.no_grad()
def trace(model: nn.Module, images: Tensor) -> Dataflow:
    """Run one forward pass in evaluation mode and record its dataflow.

    Args:
        model: any net.
        images: input of the net ``[B, C, H, W]``; one image is enough.
    """
    record = _Record()
    for tensor in (*named_tensors(model).values(), images):
        record.number(tensor)  # older than every call
    record.from_images.add(record.number(images))
    forwards = {path: record.watched(path, module.forward) for path, module in model.named_modules()}
    with evaluation_mode(model), replaced_forwards(model, forwards), record:
        output = model(images)
    return Dataflow(
        calls=tuple(record.calls[at] for at in sorted(record.calls)),
        operators=tuple(record.operators),
        outputs=frozenset(record.number(tensor) for tensor in tensors_of(output)),
        tensors={name: record.number(tensor) for name, tensor in named_tensors(model).items()},  # caches included
        from_images=frozenset(record.from_images),
    )


class _Record(TorchDispatchMode):
    """What ``trace`` writes down while the pass runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []
        self.begun = 0
        self.calls: dict[int, Call] = {}  # by their place in the order in which they began
        self.from_images: set[int] = set()
        self.numbers: dict[StorageWeakRef, int] = {}  # a weak reference keeps the address from being given out again

    def number(self, tensor: Tensor) -> int:
        """The number of the tensor's memory."""
        return self.numbers.setdefault(StorageWeakRef(tensor.untyped_storage()), len(self.numbers))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = self._values((args, kwargs))
        result = func(*args, **(kwargs or {}))
        made = self._values(result)
        in_place = func._schema.is_mutable  # noqa: SLF001 - the only place where an operator says so
        writes = (given & made or given) if in_place else frozenset()  # what it returns, or else anything
        self.operators.append(Operator(reads=given, makes=made | writes, writes=writes))
        if not given.isdisjoint(self.from_images):
            self.from_images |= made | writes
        return result

    def watched(self, path: str, forward: Forward) -> Forward:
        """The same function, whose calls are recorded under this path."""

        def call(*args: Any, **kwargs: Any) -> Any:
            place, begin, known = self.begun, len(self.operators), len(self.numbers)
            self.begun += 1
            output = forward(*args, **kwargs)
            leaves = tree_leaves(output)
            outputs = [self.number(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
            plain = all(leaf is None or isinstance(leaf, Tensor | int | float | str) for leaf in leaves)
            own = len(set(outputs)) == len(outputs) and all(value >= known for value in outputs)
            harmless = all(value >= known for operator in self.operators[begin:] for value in operator.writes)
            self.calls[place] = Call(
                path=path,
                place=place,
                begin=begin,
                end=len(self.operators),
                inner=self.begun - place - 1,
                outputs=tuple(outputs),
                plain=plain,
                repeatable=plain and own and harmless,
            )
            return output

        return call

    def _values(self, held: object) -> frozenset[int]:
        return frozenset({self.number(leaf) for leaf in tree_leaves(held) if isinstance(leaf, Tensor)})


def differing(a: nn.Module, b: nn.Module) -> frozenset[str]:
    """Names of the tensors that two nets of one architecture both have and that are not bit-equal.

    A tensor that only one of them has is a cache that a forward pass filled; it follows from the others.

    Args:
        a: one net.
        b: the other one, on the same device.
    """
    tensors, others = named_tensors(a), named_tensors(b)
    return frozenset(
        name
        for name in tensors.keys() & others.keys()
        if tensors[name] is not others[name]
        and (tensors[name].shape != others[name].shape or not torch.equal(tensors[name], others[name]))
    )
