"""Coupled groups: which entries of which tensors leave together. The vocabulary of plan, cut, recovery and report.

Plain values, no torch. A *group* is one prunable axis of the network: ``width`` channels, and for each tensor dimension
the axis runs through a *member* that gives the place of channel ``j`` on it. Sizes are small expressions over the
groups' kept widths, so that parameters and MACs of any candidate cut are arithmetic, not a rebuilt model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

Kind = Literal["channels", "heads", "head_dim"]
Role = Literal["out", "in", "elementwise"]


@dataclass(frozen=True, kw_only=True)
class IndexMap:
    """Where channel ``j`` of a group sits along one tensor dimension: ``offset + j * stride + sum(i_k * stride_k)``.

    ``loops`` holds ``(count, stride)`` pairs, one for each other factor the dimension is a product of. A plain
    convolution has ``IndexMap()``; head ``j`` of a fused qkv weight with 3 heads of width 64 has
    ``IndexMap(offset=0, stride=64, loops=((3, 192), (64, 1)))``.
    """

    offset: int = 0
    stride: int = 1
    loops: tuple[tuple[int, int], ...] = ()

    def positions(self, channels: Iterable[int]) -> list[int]:
        """All positions on the dimension that belong to ``channels`` (dense coordinates), unsorted."""
        inner = [sum(steps) for steps in itertools.product(*(range(0, n * s, s) for n, s in self.loops))]
        return [self.offset + j * self.stride + i for j in channels for i in inner]

    @property
    def repeats(self) -> int:
        """Number of positions that one channel takes on this dimension."""
        return math.prod(count for count, _ in self.loops)


@dataclass(frozen=True, kw_only=True)
class Member:
    """One place where a group's axis runs through a tensor.

    Attributes:
        tensor: dotted name in the model of a parameter, buffer or plain tensor attribute.
        dim: dimension of the tensor.
        role: use of the dimension there: with ``out`` the weight produces these channels (filters), with ``in`` it
            reads them, with ``elementwise`` it scales or shifts them (bias, norm; depthwise filters count as ``out``).
        index: positions of the channels along the dimension.
    """

    tensor: str
    dim: int
    role: Role
    index: IndexMap = IndexMap()


@dataclass(frozen=True, kw_only=True)
class Group:
    """A coupled group: channels that exist in every member and leave from all of them together.

    Attributes:
        name: name of the group, unique in its graph.
        kind: meaning of one channel, which may be a whole attention head.
        width: number of channels.
        members: places where the axis runs through tensors.
        norms: paths of the modules whose statistics run over this axis (LayerNorm, GroupNorm …). A cut changes the
            statistic, so the pruned net equals the silenced net only with the norm taken over kept channels.
    """

    name: str
    kind: Kind
    width: int
    members: tuple[Member, ...]
    norms: tuple[str, ...] = ()

    def layers(self, role: Role = "out") -> tuple[str, ...]:
        """Module paths whose tensors take part in this group in ``role``, in network order, once each."""
        return tuple(dict.fromkeys(module_of(m.tensor) for m in self.members if m.role == role))


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """An axis that is not cut, the names of the tensors on it, and the reason in words a user can act on."""

    name: str
    width: int
    tensors: tuple[str, ...]
    reason: str


# ---------------------------------------------------------------------------------------------- ties


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Groups that keep the same share of their channels, a whole multiple of ``1 / parts``."""

    groups: tuple[str, ...]
    parts: int


@dataclass(frozen=True, kw_only=True)
class Tie:
    """Groups that can only be cut together, because sizes in the program depend on each other.

    Of each of the ``choices`` exactly one bundle is cut, and all of these keep the same share of their channels; the
    groups of the other bundles keep all. Equal chunks of 8 channels are one choice of one bundle of two groups, in 8
    parts. A residual stream of 192 channels that an attention of 3 heads reads as ``heads * head_dim`` is two choices:
    the stream, in 192 parts; and the heads in 3 parts or the head width in 64. With the heads the stream is cut in
    thirds, with the head width in 64ths.
    """

    choices: tuple[tuple[Bundle, ...], ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of all groups in the choices, once each."""
        return tuple(dict.fromkeys(name for choice in self.choices for bundle in choice for name in bundle.groups))

    def selected(self, rank: Callable[[Bundle], Any], *, fewest: int = 2) -> tuple[Bundle, ...] | None:
        """One bundle of each choice, or ``None`` where no selection has a common share.

        Args:
            rank: sort key of a bundle; the lowest of each choice is preferred.
            fewest: least number of common parts. If the preferred bundles have fewer, the selection with the most
                common parts is taken instead.
        """
        if not all(self.choices):
            return None
        ranked = [sorted(choice, key=rank) for choice in self.choices]
        first = tuple(choice[0] for choice in ranked)
        most = max(bundle.parts for bundle in ranked[0])
        for parts in range(most, common_parts(first), -1) if common_parts(first) < fewest else ():
            fitting = [[bundle for bundle in choice if bundle.parts % parts == 0] for choice in ranked]
            if all(fitting):
                return tuple(choice[0] for choice in fitting)
        return first if common_parts(first) > 1 else None


def alone(group: Group) -> Tie:
    """The tie of a group that is tied to no other: one choice of one bundle, cut channel by channel."""
    return Tie(choices=((Bundle(groups=(group.name,), parts=group.width),),))


def common_parts(bundles: Iterable[Bundle]) -> int:
    """Greatest common divisor of the bundles' parts: of so many parts they can all keep the same number."""
    return math.gcd(*(bundle.parts for bundle in bundles))


# ---------------------------------------------------------------------------------------------- sizes


class Size(Protocol):
    """An extent as a function of the kept widths: ``evaluate({})`` is its size in the dense model."""

    def evaluate(self, kept: Mapping[str, int]) -> int:
        """The extent when each named group keeps that many channels (others keep all)."""


@dataclass(frozen=True)
class Const:
    """An extent that no cut changes."""

    value: int

    def evaluate(self, kept: Mapping[str, int]) -> int:
        """``value``, whatever is kept."""
        return self.value


@dataclass(frozen=True)
class Width:
    """The width of one group."""

    group: str
    full: int

    def evaluate(self, kept: Mapping[str, int]) -> int:
        """The group's kept channels; all of them where ``kept`` does not name it."""
        return kept.get(self.group, self.full)


@dataclass(frozen=True)
class Product:
    """Row-major product of extents."""

    parts: tuple[Size, ...]

    def evaluate(self, kept: Mapping[str, int]) -> int:
        """The product of the parts' extents."""
        return math.prod(part.evaluate(kept) for part in self.parts)


@dataclass(frozen=True)
class Sum:
    """Consecutive blocks (concatenation)."""

    parts: tuple[Size, ...]

    def evaluate(self, kept: Mapping[str, int]) -> int:
        """The sum of the parts' extents."""
        return sum(part.evaluate(kept) for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class OpCost:
    """The multiply-adds of one operator call for one image: the product of ``extents``."""

    module: str
    op: str
    extents: tuple[Size, ...]

    def macs(self, kept: Mapping[str, int]) -> int:
        """Multiply-adds of one image when each named group keeps that many channels (others keep all)."""
        return math.prod(extent.evaluate(kept) for extent in self.extents)


# ---------------------------------------------------------------------------------------------- attributes and folds


@dataclass(frozen=True, kw_only=True)
class AttributeEdit:
    """A Python attribute of a module that has to follow a cut (``num_heads``, ``groups``, ``normalized_shape`` …)."""

    module: str
    name: str
    before: int | float | tuple[int, ...]
    after: int | float | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ScaleFold:
    """A factor that keeps attention true which divides by the root of its own head width.

    When ``group`` shrinks from ``d`` to ``d'``, ``positions`` of ``tensor`` along ``dim`` (dense coordinates) are
    multiplied by ``sqrt(d' / d)``. softmax(q k / sqrt(d)) then keeps its value, because q is scaled by what the new
    root takes away.
    """

    group: str
    tensor: str
    dim: int
    positions: tuple[int, ...]


class AttributeConflictError(Exception):
    """No value of the modules' attributes expresses this cut.

    Attributes:
        groups: names of the groups to leave uncut.
    """

    def __init__(self, message: str, groups: Sequence[str]) -> None:
        super().__init__(message)
        self.groups = tuple(groups)


class AttributeSolver(Protocol):
    """A function from kept widths to the attribute edits that go with them."""

    def __call__(self, kept: Mapping[str, int]) -> tuple[AttributeEdit, ...]:
        """The edits for these kept widths (group name → channels; others keep all).

        Raises:
            AttributeConflictError: the attributes cannot express these widths.
        """


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The dependency graph of a model: which axes can be cut, what is coupled to them, and how sizes follow.

    Attributes:
        engine: name of the engine that built the graph (``axes`` or ``torch_pruning``).
        groups: the prunable axes, in network order, names unique.
        frozen: the axes that stay whole, each with its reason.
        ties: groups that can only be cut together (equal chunks, one shared attribute); no group is in two. Widths that
            keep to the ties can always be expressed by the attributes.
        exclusive: names of groups that are factors of one product (heads, head_dim): cut at most one of each.
        tensors: name of every parameter and buffer → extents of its dimensions.
        ops: multiply-adds of every matmul-like operator call, for one image.
        folds: attention scales that have to follow a head width.
        solve: solver of the attribute edits that follow from kept widths.
        unknown_ops: operators without a rule, with how often each was met; their axes are frozen.
    """

    engine: str
    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    ties: tuple[Tie, ...]
    exclusive: tuple[tuple[str, ...], ...]
    tensors: Mapping[str, tuple[Size, ...]]
    ops: tuple[OpCost, ...]
    folds: tuple[ScaleFold, ...]
    solve: AttributeSolver
    unknown_ops: Mapping[str, int] = field(default_factory=dict)

    def group(self, name: str) -> Group:
        """The group of that name.

        Raises:
            KeyError: the graph has no such group.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def all_ties(self) -> list[Tie]:
        """The ties, and every untied group as a tie of its own (`alone`), in network order."""
        tied = {name for tie in self.ties for name in tie.groups}
        place = {group.name: at for at, group in enumerate(self.groups)}
        ties = [*self.ties, *(alone(group) for group in self.groups if group.name not in tied)]
        return sorted(ties, key=lambda tie: min(place[name] for name in tie.groups))

    def without(self, names: Collection[str], reason: str) -> Graph:
        """A graph with these groups frozen, and with every group that can only be cut together with one of them.

        Args:
            names: names of the groups to freeze; unknown ones are ignored.
            reason: sentence that the frozen axes carry.
        """
        frozen, ties = set(names), []
        for tie in self.ties:
            choices = tuple(tuple(b for b in choice if frozen.isdisjoint(b.groups)) for choice in tie.choices)
            if Tie(choices=choices).selected(lambda _: 0) is None:
                frozen.update(tie.groups)
            else:
                ties.append(Tie(choices=choices))
        gone = (group for group in self.groups if group.name in frozen)
        return replace(
            self,
            groups=tuple(group for group in self.groups if group.name not in frozen),
            ties=tuple(ties),
            exclusive=tuple(pair for pair in self.exclusive if frozen.isdisjoint(pair)),
            frozen=(
                *self.frozen,
                *(
                    Frozen(
                        name=group.name,
                        width=group.width,
                        tensors=tuple(dict.fromkeys(member.tensor for member in group.members)),
                        reason=reason,
                    )
                    for group in gone
                ),
            ),
        )

    def macs(self, kept: Mapping[str, int]) -> int:
        """Multiply-adds of one image with these kept widths (attention matmuls included)."""
        return sum(op.macs(kept) for op in self.ops)

    def numel(self, kept: Mapping[str, int], names: Iterable[str]) -> int:
        """Number of elements of the named tensors with these kept widths."""
        return sum(math.prod(e.evaluate(kept) for e in self.tensors[name]) for name in names)


def module_of(tensor: str) -> str:
    """``layer1.0.conv1.weight`` → ``layer1.0.conv1``; a parameter of the root module has the path ``""``."""
    return tensor.rpartition(".")[0]


def tensor_name(module: str, leaf: str) -> str:
    """``layer1.0.conv1`` and ``weight`` → ``layer1.0.conv1.weight``: the inverse of `module_of`.

    Args:
        module: dotted path of the module, ``""`` for the root.
        leaf: name of the parameter, buffer or attribute inside it.
    """
    return f"{module}.{leaf}" if module else leaf
