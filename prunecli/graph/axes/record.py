"""The record of one trace: a value per tensor, equations, costs, attention calls. Rules and call handlers fill it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from prunecli.graph.axes.ints import Attribute, Expression, Extent, Fact, Ledger, Operation, TracedInt
from prunecli.graph.axes.shapes import Shapes
from prunecli.graph.axes.terms import Atom, find, freeze, is_frozen, leaves, unify
from prunecli.values.groups import Role, tensor_name

CONSTANT = "it belongs to a tensor that is no parameter, buffer or attribute of a module"
KERNEL = "it is a kernel axis"

#: The usual arguments of an operator beside tensors and lists: asking whether they are a Mapping takes long.
_NO_CONTAINERS = frozenset({int, float, bool, str, type(None), TracedInt, torch.dtype, torch.device})


@dataclass(frozen=True, kw_only=True)
class Entries:
    """Terms that differ between the entries of dimension ``over``: in a fused qkv [3, heads, head_dim] the values may
    keep other channels than the queries, only equally many.

    Attributes:
        over: the dimension along which entries differ, which is not cut.
        rows: terms of all dimensions, for each entry along ``over``; that of ``over`` itself is the same in all.
    """

    over: int
    rows: tuple[tuple[Atom, ...], ...]

    def reordered(self, order: Sequence[int]) -> Entries:
        """The entries after a permutation that puts dimension ``order[i]`` in place ``i``."""
        rows = tuple(tuple(row[d] for d in order) for row in self.rows)
        return Entries(over=order.index(self.over), rows=rows)


@dataclass(frozen=True, kw_only=True)
class TensorAxes:
    """The axes of one tensor, and where it comes from.

    Attributes:
        dims: term of each dimension; that of the first entry where ``entries`` differ.
        silent: whether entries of a channel are zero once the channel is zeroed in every parameter, by dimension.
        data: whether the tensor depends on the network input.
        sources: names of the parameters and buffers from which it is computed, if it depends on nothing else.
        origin: name of the stored tensor that it transposes, with the dimension from which each dimension comes;
            ``None`` for any other tensor.
        entries: terms of each entry along one dimension; ``None`` where they are the same.
    """

    dims: tuple[Atom, ...]
    silent: tuple[bool, ...]
    data: bool = False
    sources: frozenset[str] = frozenset()
    origin: tuple[str, tuple[int, ...]] | None = None
    entries: Entries | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operator call as it reached a rule.

    Attributes:
        name: name of the operator, without its overload.
        function: the operator itself.
        args: positional arguments.
        kwargs: keyword arguments.
        out: outputs.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    @cached_property
    def outputs(self) -> list[Tensor]:
        """The tensors among the outputs, in order."""
        return tensors_in(self.out)

    @cached_property
    def inputs(self) -> list[Tensor]:
        """The tensors among the arguments, in order."""
        return tensors_in([*self.args, *self.kwargs.values()])


@dataclass(frozen=True, kw_only=True)
class Made:
    """The origin of a tensor: output ``position`` of ``call``."""

    call: Call
    position: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operator call of the trace and the module in whose forward it was made, in words."""

    place: str
    call: Call


@dataclass(frozen=True)
class Equation:
    """``expression`` has to equal the summed sizes of ``parts``."""

    expression: Expression
    parts: tuple[Atom, ...]
    place: str

    @property
    def fact(self) -> Fact:
        """The equation as a comparison that is true."""
        total: Expression = Extent(self.parts[0])
        for part in self.parts[1:]:
            total = Operation("add", total, Extent(part))
        return Fact("eq", self.expression, total, outcome=True)


@dataclass(frozen=True, kw_only=True)
class WeightUse:
    """A parameter used as the weight of a contraction.

    Attributes:
        tensor: name of the parameter.
        dims: role of each dimension; ``None`` where the parameter was reworked first, so that only terms are known.
        produced: terms that the contraction produces.
        contracted: terms that the contraction sums over.
    """

    tensor: str
    dims: Mapping[int, Role] | None
    produced: tuple[Atom, ...]
    contracted: tuple[Atom, ...]


@dataclass(frozen=True, kw_only=True)
class TermCost:
    """The multiply-adds of one call: the product of the extents of ``terms``."""

    module: str
    op: str
    terms: tuple[Atom, ...]


@dataclass(frozen=True, kw_only=True)
class DefaultScale:
    """A scaled_dot_product_attention call with ``scale=None``.

    Attributes:
        module: path of the module that makes the call.
        call: the call.
        query: its queries ``[*batch, tokens, width]``.
        key: its keys, of the same shape.
        width: term of the head width, by whose root the call divides.
    """

    module: str
    call: Call
    query: Tensor
    key: Tensor
    width: Atom


@dataclass(kw_only=True)
class ModuleCall:
    """The tensors that a module was first called with, and those that it returned then."""

    inputs: list[TensorAxes] = field(default_factory=list)
    outputs: list[TensorAxes] = field(default_factory=list)


class Record:
    """All that one trace records. Terms are refined until the trace ends, so groups are collected only then.

    Args:
        model: the model to be traced.
        fake: whether the trace runs on torch's fake tensors instead of `Shapes`.
    """

    def __init__(self, model: nn.Module, *, fake: bool = False) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.parameters: set[str] = set()
        self.names: dict[int, list[str]] = {}
        self.homes: dict[str, Tensor] = {}
        self.used: dict[str, None] = {}
        self.attributes: dict[Attribute, int] = {}
        self.ledger = Ledger()
        self.equations: dict[Equation, None] = {}
        self.steps: list[Step] = []
        self.weights: list[WeightUse] = []
        self.costs: list[TermCost] = []
        self.heads: list[Atom] = []
        self.head_dims: list[Atom] = []
        self.norms: list[tuple[str, Atom]] = []
        self.default_scales: list[DefaultScale] = []
        self.unknown: Counter[str] = Counter()
        self.module_calls: dict[str, ModuleCall] = {}
        self.features: list[TensorAxes] = []
        self.stack: list[str] = []
        self.operator = ""
        self.request: tuple[str, tuple[Any, ...], Mapping[str, Any]] = ("", (), {})
        self._values: dict[int, TensorAxes] = {}
        self._made: dict[int, Made] = {}
        self._alive: list[Any] = []
        self._views: Counter[int] = Counter()
        self._call: Call | None = None
        self._register_homes()
        self.shapes = None if fake else Shapes(self.names)

    def _register_homes(self) -> None:
        parameters = {id(p) for module in self.modules.values() for p in module._parameters.values()}  # noqa: SLF001
        for path, module in self.modules.items():
            own = {**module._parameters, **module._buffers, **module.__dict__}  # noqa: SLF001
            for name, tensor in own.items():
                if isinstance(tensor, Tensor):
                    full = tensor_name(path, name)
                    self.homes[full] = tensor
                    if name in module._parameters:  # noqa: SLF001
                        self.parameters.add(full)
                    self.names.setdefault(id(tensor), []).append(full)
                    if id(tensor) not in self._values:
                        dims = tuple(Atom(size) for size in tensor.shape)
                        silent = id(tensor) in parameters or _holds_zeros(tensor)
                        self._values[id(tensor)] = TensorAxes(
                            dims=dims,
                            silent=(silent,) * len(dims),
                            sources=frozenset({full}),
                            origin=(full, tuple(range(len(dims)))),
                        )

    # -------------------------------------------------------------------------------------------- places

    @property
    def module(self) -> str:
        """Path of the module whose forward is running."""
        return self.stack[-1] if self.stack else ""

    @property
    def place(self) -> str:
        """The running module in words."""
        return f"module {self.module!r}" if self.module else "the model's own forward"

    # -------------------------------------------------------------------------------------------- values

    def value(self, tensor: Tensor) -> TensorAxes:
        """The value of a tensor with one term per dimension: entries that differ are made one axis."""
        known = self.peek(tensor)
        if known.entries is not None:
            for row in known.entries.rows[1:]:
                for dim, own in zip(known.dims, row, strict=True):
                    unify(dim, own)
            known = replace(known, entries=None)
            self._values[id(tensor)] = known
        return known

    def peek(self, tensor: Tensor) -> TensorAxes:
        """The value of a tensor, entries apart where they differ; a constant that is not registered is frozen."""
        known = self._values.get(id(tensor))
        if known is None:
            known = TensorAxes(
                dims=tuple(Atom(size, CONSTANT) for size in tensor.shape), silent=(False,) * tensor.dim()
            )
            self._values[id(tensor)] = known
            self._alive.append(tensor)
        names = self.names.get(id(tensor))
        if names is not None:
            self.used.setdefault(names[0])
        return known

    def dims(self, tensor: Tensor) -> tuple[Atom, ...]:
        """The term of each dimension."""
        return self.value(tensor).dims

    def put(
        self,
        tensor: Tensor,
        dims: Sequence[Atom],
        silent: Sequence[bool] | bool,
        *,
        origin: tuple[str, tuple[int, ...]] | None = None,
        entries: Entries | None = None,
    ) -> None:
        """Record an output of the current call.

        Args:
            tensor: the output.
            dims: term of each dimension; of the first entry where ``entries`` differ.
            silent: whether silenced channels are zero, by dimension or for all.
            origin: the stored tensor that the output transposes, as in `TensorAxes`.
            entries: terms of each entry along one dimension, as in `TensorAxes`.
        """
        sizes = [find(dim).size for dim in dims]
        assert sizes == list(tensor.shape), (self.operator, sizes, tensor.shape)
        inputs = [self.peek(t) for t in self._call.inputs] if self._call else []
        data = any(value.data for value in inputs)
        flags = (silent,) * len(dims) if isinstance(silent, bool) else tuple(silent)
        self._check_in_place(tensor, flags)
        self._values[id(tensor)] = TensorAxes(
            dims=tuple(dims),
            silent=flags,
            data=data,
            sources=frozenset() if data else frozenset().union(*(value.sources for value in inputs)),
            origin=origin,
            entries=entries,
        )
        self._alive.append(tensor)

    def put_input(self, tensor: Tensor, reason: str) -> None:
        """Record an input of the network, whose axes are frozen with ``reason``."""
        dims = tuple(Atom(size, reason) for size in tensor.shape)
        self._values[id(tensor)] = TensorAxes(dims=dims, silent=(False,) * len(dims), data=True)
        self._alive.append(tensor)

    def _check_in_place(self, tensor: Tensor, silent: tuple[bool, ...]) -> None:
        """An in-place op that makes channels non-zero is seen by every view of the same memory: freeze them there."""
        storage = tensor.untyped_storage()._cdata  # noqa: SLF001 - the identity of the memory has no public name
        before = self._values.get(id(tensor))
        if before is None:
            self._views[storage] += 1
        elif self._views[storage] > 1:
            for dim, was, now in zip(before.dims, before.silent, silent, strict=False):
                if was and not now:
                    freeze(dim, f"a view of it is overwritten in place in {self.place}")

    def begin(self, call: Call) -> None:
        """Make ``call`` the current call, from which all tensors come that are put until the next one."""
        self._call = call
        self.operator = call.name
        self.steps.append(Step(place=self.place, call=call))
        for position, tensor in enumerate(call.outputs):
            self._made[id(tensor)] = Made(call=call, position=position)

    def made(self, tensor: Tensor) -> Made | None:
        """The call behind a tensor, if the tensor is the output of a recorded one."""
        return self._made.get(id(tensor))

    # -------------------------------------------------------------------------------------------- statements

    def freeze(self, dims: Iterable[Atom], reason: str) -> None:
        """Forbid cutting these axes."""
        for dim in dims:
            freeze(dim, reason)

    def equate(self, size: int, parts: Sequence[Atom]) -> None:
        """Record that a Python int sizes consecutive ``parts``: an equation, or, for a literal, a reason to freeze.

        -1, wherever it comes from, leaves the size to torch.
        """
        if isinstance(size, TracedInt):
            if size.plain == -1:
                return
            if any(leaves(part) for part in parts) or not isinstance(size.expression, Extent):
                self.equations[Equation(size.expression, tuple(parts), self.place)] = None
        elif size != -1:
            self.freeze(parts, f"its size {size} is written as a number in the code of {self.place}")

    def sized(self, size: int) -> Atom:
        """A new axis made with a Python int as its size."""
        value = size.plain if isinstance(size, TracedInt) else size
        axis = Atom(value)
        self.equate(size, [axis])
        return axis

    def contract(self, left: Tensor, left_dim: int, right: Tensor, right_dim: int) -> None:
        """Record that two dimensions are multiplied and summed over: they are one axis, and one has to be silent."""
        a, b = self.value(left), self.value(right)
        unify(a.dims[left_dim], b.dims[right_dim])
        if not (a.silent[left_dim] or b.silent[right_dim]):
            freeze(a.dims[left_dim], f"{self.place} sums over it where silenced channels are not zero")
            freeze(b.dims[right_dim], f"{self.place} sums over it where silenced channels are not zero")

    def weigh(self, weight: Tensor, *, produced: Sequence[int], contracted: Sequence[int]) -> None:
        """Record that a tensor is used as a weight in a contraction with data.

        Args:
            weight: the tensor; one that depends on data itself is ignored.
            produced: its dimensions that the contraction produces.
            contracted: its dimensions that the contraction sums over.
        """
        value = self.value(weight)
        if value.data:
            return
        for source in value.sources:
            dims: dict[int, Role] | None = None
            if value.origin is not None and value.origin[0] == source:
                at = value.origin[1]
                dims = {at[d]: "in" for d in contracted}
                dims.update((at[d], "out") for d in produced)
            self.weights.append(
                WeightUse(
                    tensor=source,
                    dims=dims,
                    produced=tuple(value.dims[d] for d in produced),
                    contracted=tuple(value.dims[d] for d in contracted),
                )
            )

    def normalise(self, dims: Iterable[Atom]) -> None:
        """Record a statistic over ``dims``; whether the running module is a norm is decided after the trace."""
        self.norms.extend((self.module, dim) for dim in dims)

    def cost(self, op: str, terms: Sequence[Atom]) -> None:
        """Record the multiply-adds of a call: the product of the extents of ``terms``."""
        self.costs.append(TermCost(module=self.module, op=op, terms=tuple(terms)))

    def traced_size(self, tensor: Tensor) -> torch.Size:
        """The shape, each extent remembering its axis."""
        return torch.Size([TracedInt.of(find(dim).size, Extent(dim), self.ledger) for dim in self.peek(tensor).dims])

    def same_size(self, left: Tensor, right: Tensor) -> None:
        """Record two shapes as the same by construction (``view_as``): their extents stay equal after a cut."""
        for a, b in zip(self.peek(left).dims, self.peek(right).dims, strict=True):
            self.equal_sizes(a, b)

    def equal_sizes(self, left: Atom, right: Atom) -> None:
        """Record that two extents have to stay equal."""
        if find(left) is not find(right) and not (is_frozen(left) and is_frozen(right)):
            self.equations[Equation(Extent(left), (right,), self.place)] = None


def _holds_zeros(tensor: Tensor) -> bool:
    """Whether a stored tensor that is no parameter is zero throughout (a key bias that is not learnt).

    Buffers are silent everywhere or nowhere: their values stay when a channel is silenced. On the meta device nothing
    is known.
    """
    return not tensor.is_meta and not tensor.any()


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested sequences and mappings, in order."""
    found: list[Tensor] = []
    _add_tensors(value, found)
    return found


def _add_tensors(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for item in value:
            _add_tensors(item, found)
    elif type(value) not in _NO_CONTAINERS and isinstance(value, Mapping):
        for item in value.values():
            _add_tensors(item, found)
