"""Terms: what a tensor dimension is made of, as a product or a concatenation of axes.

Every dimension met while tracing is described by an `Atom`. Two dimensions that must keep the same indices share one
atom (union-find). An atom is

- a *leaf*: an axis, the unit that is pruned;
- a *product* of atoms, row-major: a fused qkv output after one view is ``product(3, heads, head_dim)``;
- a *concatenation* of atoms, consecutive blocks: ``torch.cat``, ``split``, ``pad``.

A leaf may be refined into a product or a concatenation later, when somebody looks at it more closely; whoever holds
the leaf then sees the refinement. What cannot be understood is *frozen*, with a reason: a frozen axis costs
compression, never correctness.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Form = Literal["leaf", "product", "concat"]


class MisfitError(Exception):
    """Two descriptions of one dimension have no common refinement."""


@dataclass(eq=False, slots=True)
class Atom:
    """A node of the union-find forest; read it through the functions of this module, which follow ``parent``.

    Attributes:
        size: number of entries.
        reason: why a leaf may not be cut; ``None`` where it may.
        form: whether it is a leaf, a product or a concatenation.
        kids: factors or blocks, in order.
        parent: the atom that this one was merged into; ``None`` for a representative.
    """

    size: int
    reason: str | None = None
    form: Form = "leaf"
    kids: list[Atom] = field(default_factory=list)
    parent: Atom | None = None

    def __repr__(self) -> str:
        atom = find(self)
        if atom.form == "leaf":
            return f"{atom.size}{'!' if atom.reason else ''}"
        separator = "*" if atom.form == "product" else "|"
        return f"({separator.join(map(repr, atom.kids))})"


def find(atom: Atom) -> Atom:
    """The representative of ``atom``."""
    while atom.parent is not None:
        if atom.parent.parent is not None:
            atom.parent = atom.parent.parent
        atom = atom.parent
    return atom


def factors(atom: Atom) -> list[Atom]:
    """The factors of an atom, products inside products opened; size-1 leaves carry no axis and are left out."""
    found: list[Atom] = []
    _add_factors(atom, found)
    return found


def _add_factors(atom: Atom, found: list[Atom]) -> None:
    atom = find(atom)
    if atom.form == "product":
        for kid in atom.kids:
            _add_factors(kid, found)
    elif atom.size != 1:
        found.append(atom)


def leaves(atom: Atom) -> list[Atom]:
    """All axes an atom is made of, in order, with repeats; size-1 axes left out."""
    found: list[Atom] = []
    _add_leaves(atom, found)
    return found


def _add_leaves(atom: Atom, found: list[Atom]) -> None:
    atom = find(atom)
    if atom.form != "leaf":
        for kid in atom.kids:
            _add_leaves(kid, found)
    elif atom.size != 1:
        found.append(atom)


def freeze(atom: Atom, reason: str) -> None:
    """Forbid cutting any axis of ``atom``; the first reason stays."""
    for leaf in leaves(atom):
        if leaf.reason is None:
            leaf.reason = reason


def is_frozen(atom: Atom) -> bool:
    """Whether no axis of ``atom`` may be cut."""
    atom = find(atom)
    if atom.form == "leaf":
        return atom.reason is not None or atom.size == 1
    return all(map(is_frozen, atom.kids))


def _refine(leaf: Atom, form: Form, kids: list[Atom]) -> list[Atom]:
    """Turn a leaf into a product or concatenation of ``kids``, which inherit its reason."""
    assert leaf.form == "leaf"
    leaf.form, leaf.kids = form, kids
    if leaf.reason is not None:
        for kid in kids:
            freeze(kid, leaf.reason)
    return kids


def product(parts: Iterable[Atom]) -> Atom:
    """The row-major product of ``parts``."""
    kids = [factor for part in parts for factor in factors(part)]
    if not kids:
        return Atom(1)
    if len(kids) == 1:
        return kids[0]
    return Atom(math.prod(kid.size for kid in kids), form="product", kids=kids)


def concat(parts: Iterable[Atom]) -> Atom:
    """The consecutive blocks ``parts``; empty blocks are dropped."""
    kids: list[Atom] = []
    for part in map(find, parts):
        if part.size:
            kids.extend(part.kids if part.form == "concat" else [part])
    if not kids:
        return Atom(0)
    if len(kids) == 1:
        return find(kids[0])
    return Atom(sum(kid.size for kid in kids), form="concat", kids=kids)


def split_front(atom: Atom, count: int) -> tuple[Atom, Atom]:
    """``atom`` seen as ``count`` rows of equal length: (rows, what is inside a row).

    Raises:
        MisfitError: the parts of the atom do not line up with that many rows.
    """
    atom = find(atom)
    if count == 1:
        return Atom(1), atom
    if count == atom.size:
        return atom, Atom(1)
    rest = factors(atom)
    front = take(rest, count)
    return product(front), product(rest)


def take(queue: list[Atom], size: int) -> list[Atom]:
    """Pop factors whose product is ``size`` off the front of ``queue``, refining the last one where needed.

    Raises:
        MisfitError: no refinement gives that size.
    """
    got: list[Atom] = []
    while size > 1:
        if not queue:
            raise MisfitError("the dimension is used up")
        head = find(queue.pop(0))
        if head.form == "product" or head.size == 1:
            queue[0:0] = factors(head)
        elif size % head.size == 0:
            got.append(head)
            size //= head.size
        elif head.size % size == 0:
            rows, rest = _split_factor(head, size)
            got += factors(rows)
            queue[0:0] = factors(rest)
            size = 1
        else:
            common = math.gcd(head.size, size)
            if common == 1 or head.form != "leaf":
                raise MisfitError(f"{head.size} does not divide into {size}")
            queue[0:0] = _split_factor(head, common)
    return got


def _split_factor(atom: Atom, rows: int) -> tuple[Atom, Atom]:
    """A leaf or concatenation as ``rows`` x the rest."""
    length = atom.size // rows
    if atom.form == "leaf":
        front, back = _refine(atom, "product", [Atom(rows), Atom(length)])
        return front, back
    if any(find(kid).size % length for kid in atom.kids):
        raise MisfitError(f"blocks {[find(kid).size for kid in atom.kids]} are not whole rows of {length}")
    pieces = [split_front(kid, find(kid).size // length) for kid in list(atom.kids)]
    back = pieces[0][1]
    for _, other in pieces[1:]:
        unify(back, other)
    return concat(front for front, _ in pieces), back


def blocks(atom: Atom, sizes: Sequence[int]) -> list[Atom]:
    """Cut ``atom`` into consecutive blocks of ``sizes`` (zeros give empty blocks).

    Raises:
        MisfitError: a cut falls inside a row of a product.
    """
    found = iter(_blocks(find(atom), [size for size in sizes if size]))
    return [next(found) if size else Atom(0) for size in sizes]


def _blocks(atom: Atom, sizes: list[int]) -> list[Atom]:
    if len(sizes) == 1:
        return [atom]
    if atom.form == "leaf":
        return _refine(atom, "concat", [Atom(size) for size in sizes])
    if atom.form == "product":
        outer, *inner = factors(atom)
        row = product(inner)
        if any(size % row.size for size in sizes):
            raise MisfitError(f"cut {sizes} falls inside a row of {row.size}")
        return [product([block, row]) for block in _blocks(find(outer), [size // row.size for size in sizes])]
    return _regroup(list(atom.kids), sizes)


def _regroup(queue: list[Atom], sizes: list[int]) -> list[Atom]:
    """Regroup consecutive blocks to ``sizes``, cutting those that straddle a border."""
    regrouped = []
    for size in sizes:
        got: list[Atom] = []
        missing = size
        while missing:
            head = find(queue.pop(0))
            if head.form == "concat":
                queue[0:0] = head.kids
            elif head.size <= missing:
                got.append(head)
                missing -= head.size
            else:
                queue[0:0] = _blocks(head, [missing, head.size - missing])
        regrouped.append(concat(got))
    return regrouped


def unify(first: Atom, second: Atom) -> None:
    """Record that two dimensions keep the same indices; without a common refinement both are frozen.

    A side of size 1 is a broadcast, which relates nothing.
    """
    first, second = find(first), find(second)
    if first is second or 1 in {first.size, second.size}:
        return
    if first.size != second.size:
        _freeze_both(first, second, f"axes of {first.size} and {second.size} meet")
    elif first.form == "leaf":
        _merge_leaf(first, second)
    elif second.form == "leaf":
        _merge_leaf(second, first)
    elif is_frozen(first) or is_frozen(second):
        _freeze_both(first, second, _reason([first, second]))
    else:
        try:
            _unify_structures(first, second)
        except MisfitError as misfit:
            _freeze_both(first, second, f"two uses of the axis cut it differently ({misfit})")


def _merge_leaf(leaf: Atom, other: Atom) -> None:
    leaf.parent = other
    if leaf.reason is not None:
        freeze(other, leaf.reason)
    elif other.form == "leaf" and other.reason is not None:
        leaf.reason = other.reason


def _freeze_both(first: Atom, second: Atom, reason: str) -> None:
    freeze(first, reason)
    freeze(second, reason)


def _reason(atoms: Iterable[Atom]) -> str:
    """The first reason found among the axes of ``atoms``; axes of one entry have none."""
    found = (leaf.reason for atom in atoms for leaf in leaves(atom) if leaf.reason is not None)
    return next(found, "it has one entry")


def _unify_structures(first: Atom, second: Atom) -> None:
    if first.form == "product" and second.form == "product":
        _unify_products(merge_frozen_runs(factors(first)), merge_frozen_runs(factors(second)))
    elif first.form == "concat" and second.form == "concat":
        cuts = {*_borders(first), *_borders(second)}
        borders = [0, *sorted(cuts)]
        sizes = [high - low for low, high in itertools.pairwise(borders)]
        for left, right in zip(blocks(first, sizes), blocks(second, sizes), strict=True):
            unify(left, right)
    else:
        blocked, rows = (first, second) if first.form == "concat" else (second, first)
        kids = list(blocked.kids)
        for left, right in zip(kids, blocks(rows, [find(kid).size for kid in kids]), strict=True):
            unify(left, right)


def _unify_products(first: list[Atom], second: list[Atom]) -> None:
    while first:
        left, right = find(first[0]), find(second[0])
        if left.form == "product":
            first[0:1] = factors(left)
        elif right.form == "product":
            second[0:1] = factors(right)
        elif left.size == right.size:
            unify(first.pop(0), second.pop(0))
        elif left.size % right.size == 0:
            first[0:1] = _split_factor(left, right.size)
        elif right.size % left.size == 0:
            second[0:1] = _split_factor(right, left.size)
        else:
            raise MisfitError(f"{left.size} and {right.size}")


def _borders(atom: Atom) -> Iterator[int]:
    return itertools.accumulate(find(kid).size for kid in atom.kids)


def merge_frozen_runs(parts: Sequence[Atom]) -> list[Atom]:
    """Replace each run of frozen factors by one frozen leaf.

    How frozen axes (windows, patches) are factored does not matter, and they are re-cut in incompatible ways
    (Swin: 8 x 7 windows, later 28 x 2); without this the misfit would freeze the channels beside them.
    """
    merged = []
    for frozen, run in itertools.groupby(parts, key=is_frozen):
        atoms = list(run)
        if frozen and (len(atoms) > 1 or find(atoms[0]).form == "concat"):
            merged.append(Atom(math.prod(find(atom).size for atom in atoms), _reason(atoms)))
        else:
            merged.extend(atoms)
    return merged


# ------------------------------------------------------------------------------------------------ where axes lie


@dataclass(frozen=True, kw_only=True)
class Occurrence:
    """The positions of channel ``j`` of an axis on a dimension: ``offset + j * stride + sum(i_k * stride_k)``.

    Attributes:
        leaf: the axis.
        offset: position of channel 0.
        stride: distance between two channels.
        loops: count and stride of each further loop ``i_k``.
    """

    leaf: Atom
    offset: int
    stride: int
    loops: tuple[tuple[int, int], ...]


def occurrences(atom: Atom) -> list[Occurrence]:
    """Every place an axis has on the dimension ``atom`` describes; an axis may have several."""
    atom = find(atom)
    if atom.form == "leaf":
        return [Occurrence(leaf=atom, offset=0, stride=1, loops=())] if atom.size != 1 else []
    found = []
    if atom.form == "concat":
        offset = 0
        for kid in map(find, atom.kids):
            found += [replace(place, offset=place.offset + offset) for place in occurrences(kid)]
            offset += kid.size
        return found
    parts = factors(atom)
    strides = [math.prod(part.size for part in parts[i + 1 :]) for i in range(len(parts))]
    for i, (part, stride) in enumerate(zip(parts, strides, strict=True)):
        others = [(parts[k].size, strides[k]) for k in range(len(parts)) if k != i]
        found += [_scaled(place, stride, others) for place in occurrences(part)]
    return found


def _scaled(place: Occurrence, scale: int, others: list[tuple[int, int]]) -> Occurrence:
    """The occurrence seen from a product in which its factor has stride ``scale`` beside loops of ``others``."""
    loops = [*others, *((count, stride * scale) for count, stride in place.loops)]
    merged: list[tuple[int, int]] = []
    for count, stride in sorted(loops, key=lambda loop: -loop[1]):
        if merged and merged[-1][1] == count * stride:
            merged[-1] = (merged[-1][0] * count, stride)
        else:
            merged.append((count, stride))
    return Occurrence(leaf=place.leaf, offset=place.offset * scale, stride=place.stride * scale, loops=tuple(merged))
