"""From the record of a trace to a `Graph`: policy (what may be cut, and how it is called) beside the mechanism."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from prunecli.axes.folds import UnknownQueryError, query_rows
from prunecli.axes.ints import Attribute, Extent, Fact, Number, attributes_in, axes_in
from prunecli.axes.named import named_sizes
from prunecli.axes.record import KERNEL, DefaultScale, Equation, Record
from prunecli.axes.solve import HeadScale, Solver
from prunecli.axes.terms import Atom, factors, find, freeze, is_frozen, leaves, occurrences
from prunecli.groups import (
    Const,
    Frozen,
    Graph,
    Group,
    IndexMap,
    Kind,
    Member,
    OpCost,
    Product,
    Role,
    ScaleFold,
    Size,
    Sum,
    Width,
    module_of,
)

TABLE = "it only runs through tables of tokens or positions, never through a layer's weight"


@dataclass(frozen=True, kw_only=True)
class _Place:
    """One member, before its group has a name."""

    leaf: Atom
    member: Member


def to_graph(record: Record) -> Graph:
    """Turn what a trace learnt into groups, costs, folds and the attribute solver."""
    _freeze_statistics(record)
    _settle(record)
    _freeze_unfoldable(record)
    _settle(record)
    places = _places(record)
    _freeze_tables(places)
    _settle(record)
    cuttable = {id(place.leaf) for place in places if place.leaf.reason is None}
    groups, names = _groups(record, places, cuttable)
    sizes = _Sizes(names)
    graph_sizes = {name: tuple(sizes.of(dim) for dim in record.dims(t)) for name, t in record.homes.items()}
    return Graph(
        engine="axes",
        groups=groups,
        frozen=_frozen(record, places),
        ties=_ties(record, names),
        exclusive=_exclusive(record, names),
        tensors=graph_sizes,
        ops=tuple(
            OpCost(module=cost.module, op=cost.op, extents=tuple(sizes.of(term) for term in cost.terms))
            for cost in record.costs
        ),
        folds=_folds(record, names),
        solve=_solver(record, sizes, names),
        unknown_ops=dict(record.unknown),
    )


# ------------------------------------------------------------------------------------------------ what is frozen


def _freeze_statistics(record: Record) -> None:
    """A statistic over an axis is a norm where the module scales that axis by a parameter of its own; else freeze."""
    kept = []
    for path, dim in record.norms:
        module = record.model.get_submodule(path)
        own = [p for p in module.parameters(recurse=False) if p is not None]
        scaled = {id(leaf) for p in own for term in record.dims(p) for leaf in leaves(term)}
        plain = not own and (hasattr(module, "normalized_shape") or hasattr(module, "num_groups"))
        is_leaf_module = next(module.children(), None) is None or hasattr(module, "normalized_shape")
        if is_leaf_module and (plain or all(id(leaf) in scaled or leaf.reason for leaf in leaves(dim))):
            kept.append((path, dim))
        else:
            freeze(dim, f"module {path!r} takes a statistic over it")
    record.norms = kept


def _settle(record: Record) -> None:
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


def _freeze_tables(places: Sequence[_Place]) -> None:
    """Policy: an axis that no weight produces or reads is a table of tokens or positions."""
    weighed = {id(place.leaf) for place in places if place.member.role != "elementwise"}
    for place in places:
        if id(place.leaf) not in weighed:
            freeze(place.leaf, TABLE)


# ------------------------------------------------------------------------------------------------ members


def _places(record: Record) -> list[_Place]:
    """Every place of every axis on every parameter, buffer and tensor attribute, in the order of use."""
    roles = _roles(record)
    order = [*record.used, *(name for name in record.homes if name not in record.used)]
    aliases = {names[0]: names for names in record.names.values()}
    places = []
    for first in order:
        for dim, term in enumerate(record.dims(record.homes[first])):
            for found in occurrences(term):
                index = IndexMap(offset=found.offset, stride=found.stride, loops=found.loops)
                role = roles.get((first, dim, id(found.leaf)), "elementwise")
                places += [
                    _Place(leaf=found.leaf, member=Member(tensor=name, dim=dim, role=role, index=index))
                    for name in aliases.get(first, ())
                ]
    return places


def _roles(record: Record) -> dict[tuple[str, int, int], Role]:
    """What each axis does on each dimension of each weight: produced by it (out) or read by it (in)."""
    roles: dict[tuple[str, int, int], Role] = {}
    for use in record.weights:
        terms = record.dims(record.homes[use.tensor])
        out = {id(leaf) for term in use.produced for leaf in leaves(term)}
        read = {id(leaf) for term in use.contracted for leaf in leaves(term)}
        for dim, term in enumerate(terms):
            for leaf in leaves(term):
                role: Role | None
                if use.dims is not None:
                    role = use.dims.get(dim)
                else:
                    role = "out" if id(leaf) in out and (dim == 0 or id(leaf) not in read) else None
                    role = "in" if role is None and id(leaf) in read else role
                if role is not None:
                    roles.setdefault((use.tensor, dim, id(leaf)), role)
    return roles


def _groups(record: Record, places: Sequence[_Place], cuttable: set[int]) -> tuple[tuple[Group, ...], dict[int, str]]:
    """The groups in network order, and the name of each by the identity of its axis."""
    parameters = {name for name, _ in record.model.named_parameters(remove_duplicate=False)}
    members: dict[int, list[Member]] = defaultdict(list)
    axes: dict[int, Atom] = {}
    for place in places:
        if id(place.leaf) in cuttable:
            members[id(place.leaf)].append(place.member)
            axes[id(place.leaf)] = place.leaf
    axes = {key: leaf for key, leaf in axes.items() if any(m.tensor in parameters for m in members[key])}
    kinds = _kinds(record)
    norms: dict[int, dict[str, None]] = defaultdict(dict)
    for path, dim in record.norms:
        for leaf in leaves(dim):
            norms[id(leaf)][path] = None
    order = {name: i for i, name in enumerate(record.used)}
    ordered = sorted(axes, key=lambda key: min(order.get(m.tensor, len(order)) for m in _producers(members[key])))
    names = _names({key: members[key] for key in ordered}, kinds)
    groups = tuple(
        Group(
            name=names[key],
            kind=kinds.get(key, "channels"),
            width=axes[key].size,
            members=tuple(members[key]),
            norms=tuple(norms[key]),
        )
        for key in ordered
    )
    return groups, names


def _kinds(record: Record) -> dict[int, Kind]:
    kinds: dict[int, Kind] = {id(leaf): "head_dim" for term in record.head_dims for leaf in leaves(term)}
    kinds.update((id(leaf), "heads") for term in record.heads for leaf in leaves(term))
    return kinds


def _producers(members: Sequence[Member]) -> list[Member]:
    return [m for m in members if m.role == "out"] or list(members)


def _names(members: dict[int, list[Member]], kinds: dict[int, Kind]) -> dict[int, str]:
    """Path of the module that first produces the axis, its kind if special, and a number where that is not unique."""
    seen: Counter[str] = Counter()
    names = {}
    for key, own in members.items():
        producer = _producers(own)[0].tensor
        name = module_of(producer) or producer
        if kinds.get(key, "channels") != "channels":
            name = f"{name}:{kinds[key]}"
        seen[name] += 1
        names[key] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return names


def _frozen(record: Record, places: Sequence[_Place]) -> tuple[Frozen, ...]:
    """The frozen axes that lie on parameters, but for kernel axes."""
    parameters = {name for name, _ in record.model.named_parameters()}
    members: dict[int, list[Member]] = defaultdict(list)
    axes: dict[int, Atom] = {}
    for place in places:
        if place.leaf.reason not in {None, KERNEL} and place.member.tensor in parameters:
            members[id(place.leaf)].append(place.member)
            axes[id(place.leaf)] = place.leaf
    names = _names(members, {})
    return tuple(
        Frozen(
            name=names[key],
            width=axes[key].size,
            tensors=tuple(dict.fromkeys(m.tensor for m in own)),
            reason=axes[key].reason or "",
        )
        for key, own in members.items()
    )


# ------------------------------------------------------------------------------------------------ sizes


class _Sizes:
    """Terms as size expressions over the named groups."""

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names

    def of(self, atom: Atom) -> Size:
        atom = find(atom)
        if atom.form == "leaf":
            name = self._names.get(id(atom))
            return Const(atom.size) if name is None else Width(name, atom.size)
        if not any(id(leaf) in self._names for leaf in leaves(atom)):
            return Const(atom.size)
        parts = tuple(self.of(kid) for kid in atom.kids)
        return Product(parts) if atom.form == "product" else Sum(parts)


# ------------------------------------------------------------------------------------------------ ties, exclusion


def _exclusive(record: Record, names: dict[int, str]) -> tuple[tuple[str, ...], ...]:
    """Pairs of groups that are factors of one product on some tensor."""
    pairs: dict[tuple[str, ...], None] = {}
    for tensor in record.homes.values():
        for term in record.dims(tensor):
            for first, second in _factor_pairs(term):
                left, right = names.get(id(first)), names.get(id(second))
                if left is not None and right is not None and left != right:
                    pairs.setdefault(tuple(sorted((left, right))))
    return tuple(pairs)


def _factor_pairs(atom: Atom) -> Iterator[tuple[Atom, Atom]]:
    atom = find(atom)
    if atom.form == "product":
        for left, right in itertools.combinations(factors(atom), 2):
            yield from itertools.product(leaves(left), leaves(right))
    for kid in atom.kids:
        yield from _factor_pairs(kid)


def _ties(record: Record, names: dict[int, str]) -> tuple[tuple[str, ...], ...]:
    """Groups whose widths one attribute, or one comparison of extents, holds equal."""
    linked: dict[str, set[str]] = {}
    for first, second in _equal_terms(record):
        pair = _remaining_pair(first, second, names)
        if pair is not None:
            joined = linked.get(pair[0], {pair[0]}) | linked.get(pair[1], {pair[1]})
            linked.update(dict.fromkeys(joined, joined))
    order = list(names.values())
    unique = {tuple(sorted(tied, key=order.index)): None for tied in linked.values()}
    return tuple(unique)


def _equal_terms(record: Record) -> Iterator[tuple[Atom, Atom]]:
    """Pairs of terms that must keep equal sizes."""
    sized: dict[Attribute, Atom] = {}
    for equation in record.equations:
        if len(equation.parts) != 1:
            continue
        part = equation.parts[0]
        if isinstance(equation.expression, Extent):
            yield equation.expression.atom, part
        elif isinstance(equation.expression, Attribute):
            yield sized.setdefault(equation.expression, part), part
    for fact in record.ledger.facts:
        if fact.outcome is (fact.comparison == "eq") and isinstance(fact.left, Extent):
            if isinstance(fact.right, Extent) and fact.comparison in {"eq", "ne"}:
                yield fact.left.atom, fact.right.atom


def _remaining_pair(first: Atom, second: Atom, names: dict[int, str]) -> tuple[str, str] | None:
    """What two equal products say about single groups once common factors are cancelled."""
    left, right = Counter(map(id, factors(first))), Counter(map(id, factors(second)))
    sizes = {id(factor): factor.size for factor in (*factors(first), *factors(second))}
    only_left, only_right = left - right, right - left
    named = [[key for key in side.elements() if key in names] for side in (only_left, only_right)]
    fixed = [math.prod(sizes[key] for key in side.elements() if key not in names) for side in (only_left, only_right)]
    if [len(side) for side in named] == [1, 1] and fixed[0] == fixed[1]:
        return names[named[0][0]], names[named[1][0]]
    return None


# ------------------------------------------------------------------------------------------------ attention scales


def _scaling_axis(scale: DefaultScale) -> Atom | None:
    """The one axis whose cut changes a head width; None where none or no single factor does."""
    free = [leaf for leaf in leaves(scale.width) if leaf.reason is None]
    simple = all(factor.form == "leaf" for factor in factors(scale.width))
    return free[0] if len(free) == 1 and simple else None


def _freeze_unfoldable(record: Record) -> None:
    """Without knowing what makes the query, a default attention scale could not be kept true."""
    for scale in record.default_scales:
        if is_frozen(scale.width):
            continue
        where = f"the attention in module {scale.module!r} divides by the root of it"
        if _scaling_axis(scale) is None:
            freeze(scale.width, f"{where} and it has several parts")
            continue
        try:
            rows = query_rows(record, scale.query)
            others = {(r.tensor, r.dim): r.positions for r in _known_rows(record, scale)}
        except UnknownQueryError as unknown:
            freeze(scale.width, f"{where} and {unknown}")
            continue
        if any(r.positions & others.get((r.tensor, r.dim), frozenset()) for r in rows):
            freeze(scale.width, f"{where} and queries and keys share weights")


def _known_rows(record: Record, scale: DefaultScale) -> list:  # type: ignore[type-arg]
    try:
        return query_rows(record, scale.key)
    except UnknownQueryError:
        return []


def _folds(record: Record, names: dict[int, str]) -> tuple[ScaleFold, ...]:
    folds = []
    for scale in record.default_scales:
        axis = _scaling_axis(scale)
        if axis is not None and id(axis) in names:
            folds += [
                ScaleFold(
                    group=names[id(axis)], tensor=rows.tensor, dim=rows.dim, positions=tuple(sorted(rows.positions))
                )
                for rows in query_rows(record, scale.query)
            ]
    return tuple(folds)


def _head_scales(record: Record, sizes: _Sizes) -> list[HeadScale]:
    """Float attributes equal to ``head width ** -0.5`` of the modules that let the attention operator compute it."""
    found = {}
    for scale in record.default_scales:
        module: nn.Module = record.model.get_submodule(scale.module)
        root = find(scale.width).size ** -0.5
        for name, value in vars(module).items():
            if type(value) is float and value == root:
                found[scale.module, name] = HeadScale(
                    module=scale.module, name=name, before=value, size=sizes.of(scale.width)
                )
    return list(found.values())


# ------------------------------------------------------------------------------------------------ attributes


def _solver(record: Record, sizes: _Sizes, names: dict[int, str]) -> Solver:
    listed: dict[tuple[str, str], list[int]] = defaultdict(list)
    for attribute, value in record.attributes.items():
        if attribute.index is not None:
            listed[attribute.module, attribute.name].append(value)
    return Solver(
        attributes=record.attributes,
        listed={key: tuple(values) for key, values in listed.items()},
        equations=tuple(record.equations),
        facts=tuple(record.ledger.facts),
        pins=record.ledger.pins,
        size_of=sizes.of,
        group_of=names,
        named=named_sizes(record, sizes.of),
        scales=_head_scales(record, sizes),
    )
