"""From the record of a trace to a `Graph`: groups and what is frozen, named and ordered."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prunecli.graph.axes.elimination import System, eliminate
from prunecli.graph.axes.ints import Attribute, attributes_in, axes_in
from prunecli.graph.axes.named import named_sizes
from prunecli.graph.axes.policy import freeze_numbers, freeze_rebuilt, freeze_statistics
from prunecli.graph.axes.record import KERNEL, Record
from prunecli.graph.axes.relations import Sizes, exclusive_pairs
from prunecli.graph.axes.scales import foldable_scales, head_scales, scale_folds
from prunecli.graph.axes.shares import Choices, Shrinking, shares
from prunecli.graph.axes.solve import Check, Formula, Solver
from prunecli.graph.axes.terms import Atom, freeze, leaves, occurrences
from prunecli.values.groups import Bundle, Frozen, Graph, Group, IndexMap, Kind, Member, OpCost, Role, Tie, module_of

TABLE = "it only runs through tables of tokens or positions, never through a layer's weight"


@dataclass(frozen=True, kw_only=True)
class _Place:
    """One member, before its group has a name."""

    leaf: Atom
    member: Member


@dataclass(frozen=True, kw_only=True)
class Inference:
    """A graph, with the axes behind its names.

    Attributes:
        graph: groups, costs, folds and the attribute solver.
        axes: the axis of each group, by name.
        sizes: terms as functions of kept widths.
    """

    graph: Graph
    axes: Mapping[str, Atom]
    sizes: Sizes


def infer(record: Record) -> Inference:
    """Turn a trace into groups, costs, folds and the attribute solver.

    Args:
        record: the finished trace; axes that cannot be cut are frozen in it.
    """
    freeze_statistics(record)
    freeze_rebuilt(record)
    freeze_numbers(record)
    scales = foldable_scales(record)
    places = _places(record)
    _freeze_tables(places)
    system = eliminate(record, _cuttable(record, places))
    found = shares({number: axis.size for number, axis in system.axes.items()}, system.constraints)
    for number, reason in found.held.items():
        freeze(system.axes[number], reason)
    groups, names = _groups(record, places)
    sizes = Sizes(names)
    number_of = {id(axis): number for number, axis in system.axes.items()}
    numbered = {number_of[key]: name for key, name in names.items() if key in number_of}
    graph_sizes = {name: tuple(sizes.of(dim) for dim in record.dims(t)) for name, t in record.homes.items()}
    axes = {names[id(place.leaf)]: place.leaf for place in places if id(place.leaf) in names}
    graph = Graph(
        engine="axes",
        groups=groups,
        frozen=_frozen(record, places),
        ties=tuple(_tie(choices, numbered) for choices in found.ties),
        exclusive=exclusive_pairs(record, names),
        tensors=graph_sizes,
        ops=tuple(
            OpCost(module=cost.module, op=cost.op, extents=tuple(sizes.of(term) for term in cost.terms))
            for cost in record.costs
        ),
        folds=scale_folds(scales, names),
        solve=_solver(record, system, sizes),
        unknown_ops=dict(record.unknown),
    )
    return Inference(graph=graph, axes=axes, sizes=sizes)


def _freeze_tables(places: Sequence[_Place]) -> None:
    """Policy: an axis that no weight produces or reads is a table of tokens or positions."""
    weighed = {id(place.leaf) for place in places if place.member.role != "elementwise"}
    for place in places:
        if id(place.leaf) not in weighed:
            freeze(place.leaf, TABLE)


# ----------------------------------------------------------------------------------------------- members


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
    """The role of each axis by tensor, dimension and identity of the axis: produced there (out) or read (in)."""
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


def _cuttable(record: Record, places: Sequence[_Place]) -> dict[int, Atom]:
    """The axes of parameters that nothing has frozen, by identity."""
    free = (place for place in places if place.leaf.reason is None)
    return {id(place.leaf): place.leaf for place in free if place.member.tensor in record.parameters}


def _groups(record: Record, places: Sequence[_Place]) -> tuple[tuple[Group, ...], dict[int, str]]:
    """The groups in network order, and the name of each by the identity of its axis."""
    axes = _cuttable(record, places)
    members: dict[int, list[Member]] = defaultdict(list)
    for place in places:
        if id(place.leaf) in axes:
            members[id(place.leaf)].append(place.member)
    kinds: dict[int, Kind] = {id(leaf): "head_dim" for term in record.head_dims for leaf in leaves(term)}
    kinds.update((id(leaf), "heads") for term in record.heads for leaf in leaves(term))
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


def _producers(members: Sequence[Member]) -> list[Member]:
    """The members that produce an axis; all of its members where none does."""
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


# ----------------------------------------------------------------------------------------------- attributes


def _tie(choices: Choices, names: Mapping[int, str]) -> Tie:
    """A tie in the names of groups; ``names`` by the number of an axis, in network order."""
    place = {name: at for at, name in enumerate(names.values())}

    def bundle(one: Shrinking) -> Bundle:
        return Bundle(groups=tuple(sorted((names[axis] for axis in one.axes), key=place.__getitem__)), parts=one.parts)

    def first(bundles: tuple[Bundle, ...]) -> int:
        return min(place[bundle.groups[0]] for bundle in bundles)

    return Tie(choices=tuple(sorted((tuple(map(bundle, choice)) for choice in choices), key=first)))


def _solver(record: Record, system: System, sizes: Sizes) -> Solver:
    """The attribute solver of a trace whose attributes are eliminated."""
    listed: dict[tuple[str, str], list[int]] = defaultdict(list)
    for attribute, value in record.attributes.items():
        if attribute.index is not None:
            listed[attribute.module, attribute.name].append(value)
    formulas = {
        attribute: Formula(value=value, groups=sizes.groups(system.axes[number] for number in value.variables()))
        for attribute, value in system.definitions.items()
    }
    return Solver(
        attributes=record.attributes,
        listed={key: tuple(values) for key, values in listed.items()},
        formulas=formulas,
        widths={number: sizes.of(axis) for number, axis in system.axes.items()},
        checks=tuple(_checks(record, sizes, formulas)),
        size_of=sizes.of,
        named=named_sizes(record, sizes.of),
        scales=head_scales(record, sizes.of),
    )


def _checks(record: Record, sizes: Sizes, formulas: Mapping[Attribute, Formula]) -> Iterator[Check]:
    """The facts about sizes that depend on at least one group."""
    facts = {equation.fact: equation.place for equation in record.equations}
    facts |= dict.fromkeys([*record.ledger.facts, *record.ledger.pinned()], "the model")
    for fact, place in facts.items():
        attributes = attributes_in(fact.left) | attributes_in(fact.right)
        groups = sizes.groups([*axes_in(fact.left), *axes_in(fact.right)])
        groups = groups.union(*(formulas[a].groups for a in attributes if a in formulas))
        if groups:
            yield Check(fact=fact, place=place, groups=groups)
