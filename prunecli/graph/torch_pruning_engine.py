"""Reference engine: Torch-Pruning's DependencyGraph (Fang et al., CVPR 2023) behind the Graph type.

It is a cross-check of axis inference, for tests and benchmarks, and not meant for users: it supports fewer models.

It traces the autograd graph instead of the operators. For the channels of one layer it returns the coupled positions of
all others; here these become groups with index maps. What it cannot express stays: axes inside attention (it does not
know heads), layers without a rule, couplings without a regular pattern. Attributes follow where layers state them
(``groups``, ``normalized_shape``, ``num_channels``, the model's ``num_features``); ``feature_info`` is left. A wrong
coupling is caught by the proof of the plan (`prunecli.proof.equivalence`), like any other.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch_pruning
from torch import Tensor, nn

from prunecli.errors import UnsupportedError, one_line
from prunecli.measure.cost import count_macs
from prunecli.models.layers import switch_fused_attention_
from prunecli.models.tensors import clear_caches_, named_tensors
from prunecli.values.groups import (
    AttributeEdit,
    Const,
    Frozen,
    Graph,
    Group,
    IndexMap,
    Member,
    OpCost,
    Product,
    Role,
    Size,
    Sum,
    Width,
    module_of,
)

_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTED: Final = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
_NORM_SIZES: Final = ("normalized_shape", "num_channels")  # attributes of norms whose statistic runs over the channels
_TRACE_ERRORS: Final = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    IndexError,
    KeyError,
    NotImplementedError,
)

_Place = tuple[str, int, Role]  # tensor, dimension, role
_Positions = dict[int, set[int]]  # channel of the root layer → positions on one dimension


def build(model: nn.Module, input_size: tuple[int, int, int]) -> Graph:
    """The dependency graph as Torch-Pruning sees it.

    Args:
        model: the model, on any device; a copy without values is traced.
        input_size: channels, height, width of one image.

    Raises:
        UnsupportedError: Torch-Pruning cannot trace the model, or couples it inconsistently.
    """
    shell = _shell(model)
    with _named_failure(shell):
        calls = _calls(shell, input_size)
        couplings = _couplings(shell, input_size)
    results = [_group(shell, coupling) for coupling in couplings]
    groups = _in_network_order(shell, (result for result in results if isinstance(result, Group)))
    sizes = _sizes(shell, groups)
    return Graph(
        engine="torch_pruning",
        groups=groups,
        frozen=tuple(result for result in results if isinstance(result, Frozen)),
        ties=(),
        exclusive=(),
        tensors=sizes,
        ops=_ops(calls, sizes, count_macs(model, input_size)),
        folds=(),
        solve=_Attributes(tuple(_attributes(shell, groups))),
    )


# ---------------------------------------------------------------------------------------------- tracing


@dataclass(frozen=True, kw_only=True)
class _Coupling:
    """One group as Torch-Pruning returns it.

    Attributes:
        width: number of channels of the root layer.
        places: positions of each root channel, by tensor, dimension and role.
        modules: paths of the coupled layers.
        norms: paths of the norms whose statistic runs over the channels.
        group_counts: ``groups`` of the coupled convolutions and norms, depthwise ones left out.
        refusal: why the group cannot be cut; ``None`` where it can.
    """

    width: int
    places: Mapping[_Place, _Positions]
    modules: tuple[str, ...]
    norms: tuple[str, ...]
    group_counts: tuple[int, ...]
    refusal: str | None


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of a layer, whose weight is applied ``times`` times for one image."""

    module: str
    times: int


def _shell(model: nn.Module) -> nn.Module:
    """A copy without values that autograd can trace; attention is written out, as a fused kernel is one opaque node."""
    clear_caches_(model)
    empty: dict[int, Any] = {}
    for tensor in named_tensors(model).values():
        bare = torch.empty_like(tensor, device="meta")
        trainable = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        empty[id(tensor)] = nn.Parameter(bare) if trainable else bare
    shell = copy.deepcopy(model, empty).eval()
    switch_fused_attention_(shell, on=False)
    return shell


@contextmanager
def _named_failure(shell: nn.Module) -> Iterator[None]:
    """Turns whatever tracing raises into an UnsupportedError."""
    try:
        yield
    except _TRACE_ERRORS as error:
        raise UnsupportedError(
            f"Torch-Pruning cannot trace {type(shell).__name__}: {one_line(error)}.", hint="Use prune.graph=axes."
        ) from error


def _calls(shell: nn.Module, input_size: tuple[int, int, int]) -> list[_Call]:
    """The calls of convolutions and linear layers in one forward pass."""
    calls: list[_Call] = []

    def hook(path: str) -> Any:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            counted = inputs[0] if isinstance(module, _TRANSPOSED) else output
            channels = counted.shape[-1] if isinstance(module, nn.Linear) else counted.shape[1]
            calls.append(_Call(module=path, times=counted.numel() // channels))

        return record

    hooks = [m.register_forward_hook(hook(path)) for path, m in shell.named_modules() if isinstance(m, _WEIGHTED)]
    shell(torch.empty(1, *input_size, device="meta"))
    for handle in hooks:
        handle.remove()
    return calls


def _couplings(shell: nn.Module, input_size: tuple[int, int, int]) -> list[_Coupling]:
    """Every group that Torch-Pruning finds."""
    names = {id(module): path for path, module in shell.named_modules()}
    parameters = {id(parameter): name for name, parameter in shell.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Fresh containers: Torch-Pruning fills its default arguments and keeps them for the process.
        graph = torch_pruning.DependencyGraph().build_dependency(
            shell, torch.empty(1, *input_size, device="meta"), unwrapped_parameters=[], verbose=False
        )
        groups = graph.get_all_groups(ignored_layers=[])
        return [_coupling(group, graph, names, parameters) for group in groups]


def _coupling(group: Any, graph: Any, names: Mapping[int, str], parameters: Mapping[int, str]) -> _Coupling:
    """Torch-Pruning's (dependency, indices) list as places and positions."""
    places: dict[_Place, _Positions] = {}
    modules, norms, counts, refusal = [], [], [], None
    for item in group.items:
        node, module = item.dep.target, item.dep.target.module
        outwards = id(module) not in names or graph.is_out_channel_pruning_fn(item.dep.handler)
        if outwards and not node.outputs:
            refusal = refusal or "it is an axis of the network's output"
        if isinstance(module, nn.Parameter):
            touched: list[_Place] = [(parameters[id(module)], node.pruning_dim % module.dim(), "elementwise")]
        elif id(module) not in names:
            continue  # an operator without tensors
        else:
            path = names[id(module)]
            modules.append(path)
            known = _places(module, path, outwards=outwards)
            refusal = refusal or (None if known is not None else f"{path} ({type(module).__name__}) has no rule")
            touched = known or []
            if any(hasattr(module, name) for name in _NORM_SIZES):
                norms.append(path)
            count = getattr(module, "groups", getattr(module, "num_groups", 1))
            counts += [] if _is_depthwise(module) else [count]
        for place in touched:
            for root, position in zip(item.root_idxs, item.idxs, strict=True):
                places.setdefault(place, {}).setdefault(root, set()).add(position)
    width = len(group.items[0].idxs)
    return _Coupling(
        width=width,
        places=places,
        modules=tuple(dict.fromkeys(modules)),
        norms=tuple(dict.fromkeys(norms)),
        group_counts=tuple(counts),
        refusal=refusal,
    )


def _places(module: nn.Module, path: str, *, outwards: bool) -> list[_Place] | None:
    """The tensor dimensions of a layer along its output (or input) axis; ``None`` for an unknown layer."""

    def at(leaf: str, dim: int, role: Role) -> _Place:
        return (f"{path}.{leaf}", dim, role)

    def have(*leaves: str) -> list[_Place]:
        return [at(leaf, 0, "elementwise") for leaf in leaves if isinstance(getattr(module, leaf, None), Tensor)]

    if isinstance(module, _WEIGHTED):
        if _is_depthwise(module):
            return [at("weight", 0, "out"), *have("bias")]
        first = isinstance(module, _TRANSPOSED) != outwards  # a transposed weight has its inputs first
        side = at("weight", 0 if first else 1, "out" if outwards else "in")
        return [side, *(have("bias") if outwards else [])]
    if isinstance(module, _NORMS) and not (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1):
        return have("weight", "bias", "running_mean", "running_var")
    return None if any(True for _ in module.parameters(recurse=False)) else []


def _is_depthwise(module: nn.Module) -> bool:
    """Whether each channel of a convolution is a group of its own."""
    return isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels


# ---------------------------------------------------------------------------------------------- groups


def _group(shell: nn.Module, coupling: _Coupling) -> Group | Frozen:
    """The coupling as a group, or as frozen axes with the reason."""
    tensors = named_tensors(shell)
    order = {name: at for at, name in enumerate(tensors)}
    places = sorted(coupling.places, key=lambda place: (order[place[0]], place[1]))
    producers = [tensor for tensor, _, role in places if role == "out"]
    name = module_of(producers[0]) if producers else coupling.modules[0]

    def stays(reason: str) -> Frozen:
        touched = tuple(dict.fromkeys(tensor for tensor, _, _ in places))
        return Frozen(name=name, width=coupling.width, tensors=touched, reason=reason)

    if coupling.refusal:
        return stays(coupling.refusal)
    attention = _attention_around(shell, coupling.modules)
    if attention:
        return stays(f"it lies inside {attention}, whose heads this engine does not know")
    channels = _classes(coupling)
    if channels is None:
        return stays("its coupling is no regular pattern")
    members = []
    for tensor, dim, role in places:
        positions, size = coupling.places[tensor, dim, role], tensors[tensor].shape[dim]
        # A grouped convolution's input side states positions over all groups; its weight has those of one.
        each = [sorted({at % size for root in roots for at in positions.get(root, ())}) for roots in channels]
        index = _fit(each)
        if index is None:
            return stays(f"its positions on {tensor} are no regular pattern")
        members.append(Member(tensor=tensor, dim=dim, role=role, index=index))
    return Group(name=name, kind="channels", width=len(channels), members=tuple(members), norms=coupling.norms)


def _attention_around(shell: nn.Module, modules: Sequence[str]) -> str | None:
    """Path of the attention module that contains all of these modules, if there is one."""
    for path, module in shell.named_modules():
        if path and hasattr(module, "num_heads") and all(name.startswith(f"{path}.") for name in modules):
            return path
    return None


def _classes(coupling: _Coupling) -> list[list[int]] | None:
    """Channels as sets of root channels that leave together, in order; ``None`` where these sets differ in size.

    Root channels that share a position anywhere belong together, and so do those that a grouped layer must lose
    from all of its groups at once.
    """
    together = _Partition(coupling.width)
    for positions in coupling.places.values():
        owners: dict[int, list[int]] = {}
        for root, taken in positions.items():
            for at in taken:
                owners.setdefault(at, []).append(root)
        for roots in owners.values():
            together.join(roots)
    for count in coupling.group_counts:
        if coupling.width % count:
            return None
        inner = coupling.width // count
        for j in range(inner if count > 1 else 0):
            together.join(range(j, coupling.width, inner))
    sets = together.sets()
    return sets if len({len(roots) for roots in sets}) == 1 else None


class _Partition:
    """Numbers 0 … size - 1 in disjoint sets, each known by its smallest member."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def _find(self, number: int) -> int:
        while self._parent[number] != number:
            number = self._parent[number]
        return number

    def join(self, numbers: Iterable[int]) -> None:
        """Put these numbers' sets together."""
        heads = {self._find(number) for number in numbers}
        for head in heads:
            self._parent[head] = min(heads)

    def sets(self) -> list[list[int]]:
        """The sets, ordered by their smallest members."""
        found: dict[int, list[int]] = {}
        for number in range(len(self._parent)):
            found.setdefault(self._find(number), []).append(number)
        return list(found.values())


def _fit(positions: Sequence[Sequence[int]]) -> IndexMap | None:
    """The index map with these (ascending) positions per channel; ``None`` where they follow no regular pattern."""
    if not all(positions) or len({len(each) for each in positions}) != 1:
        return None
    first = positions[0]
    stride = positions[1][0] - first[0] if len(positions) > 1 else 1
    steps = [at - first[0] for at in first]
    loops = []
    while len(steps) > 1:
        step, run = steps[1], 1
        while run < len(steps) and steps[run] == run * step:
            run += 1
        if len(steps) % run:
            return None
        loops.append((run, step))
        steps = steps[::run]
    index = IndexMap(offset=first[0], stride=stride, loops=tuple(reversed(loops)))
    fits = all(sorted(index.positions([j])) == list(each) for j, each in enumerate(positions))
    return index if fits else None


def _in_network_order(shell: nn.Module, groups: Iterable[Group]) -> tuple[Group, ...]:
    """Sorted by where their first tensor stands in the model; equal names get a number."""
    place = {name: at for at, name in enumerate(named_tensors(shell))}
    seen: Counter[str] = Counter()
    ordered = []
    for group in sorted(groups, key=lambda group: place[group.members[0].tensor]):
        seen[group.name] += 1
        count = seen[group.name]
        ordered.append(group if count == 1 else replace(group, name=f"{group.name}#{count}"))
    return tuple(ordered)


# ---------------------------------------------------------------------------------------------- sizes and costs


def _sizes(shell: nn.Module, groups: Sequence[Group]) -> dict[str, tuple[Size, ...]]:
    """Extents of every parameter and buffer. Raises UnsupportedError where two groups claim one position."""
    tensors = named_tensors(shell)
    taken: dict[tuple[str, int], dict[int, str]] = {}
    parts: dict[tuple[str, int], list[Size]] = {}
    for group in groups:
        for member in group.members:
            at = (member.tensor, member.dim)
            owner = taken.setdefault(at, {})
            for position in member.index.positions(range(group.width)):
                if owner.setdefault(position, group.name) != group.name:
                    raise UnsupportedError(
                        f"Torch-Pruning counts position {position} of {member.tensor} to the groups "
                        f"{owner[position]} and {group.name}.",
                        hint="Use prune.graph=axes.",
                    )
            width = Width(group.name, group.width)
            repeats = member.index.repeats
            parts.setdefault(at, []).append(width if repeats == 1 else Product((width, Const(repeats))))

    def extent(name: str, dim: int) -> Size:
        cut = parts.get((name, dim), [])
        rest = tensors[name].shape[dim] - sum(part.evaluate({}) for part in cut)
        whole = [*([Const(rest)] if rest or not cut else []), *cut]
        return whole[0] if len(whole) == 1 else Sum(tuple(whole))

    return {name: tuple(extent(name, dim) for dim in range(t.dim())) for name, t in tensors.items()}


def _ops(calls: Sequence[_Call], sizes: Mapping[str, tuple[Size, ...]], total: int) -> tuple[OpCost, ...]:
    """Multiply-adds of each layer call, which scale with its weight; the rest of the measured ``total`` is constant.

    The rest is mostly attention products, which have no weight.
    """
    ops = [
        OpCost(module=call.module, op="layer", extents=(Const(call.times), *sizes[f"{call.module}.weight"]))
        for call in calls
    ]
    rest = total - sum(op.macs({}) for op in ops)
    return (*ops, OpCost(module="", op="other", extents=(Const(rest),)))


# ---------------------------------------------------------------------------------------------- attributes


@dataclass(frozen=True, kw_only=True)
class _Followed:
    """An attribute that states a size.

    Attributes:
        module: path of the module.
        name: name of the attribute.
        before: size in the dense model.
        size: size as a function of kept widths.
        is_tuple: whether the value is a tuple of one number instead of a number.
    """

    module: str
    name: str
    before: int
    size: Size
    is_tuple: bool


@dataclass(frozen=True)
class _Attributes:
    """The attribute solver: every stated size follows from the kept widths."""

    followed: tuple[_Followed, ...]

    def __call__(self, kept: Mapping[str, int]) -> tuple[AttributeEdit, ...]:
        edits = []
        for one in self.followed:
            after = one.size.evaluate(kept)
            if after != one.before:
                before: Any = (one.before,) if one.is_tuple else one.before
                value: Any = (after,) if one.is_tuple else after
                edits.append(AttributeEdit(module=one.module, name=one.name, before=before, after=value))
        return tuple(edits)


def _attributes(shell: nn.Module, groups: Sequence[Group]) -> Iterator[_Followed]:
    """The attributes that state sizes: of depthwise convolutions, of norms and of the model itself."""
    sizes = _sizes(shell, groups)
    for path, module in shell.named_modules():
        weight = f"{path}.weight"
        if weight not in sizes:
            continue
        if _is_depthwise(module):
            yield _Followed(module=path, name="groups", before=module.groups, size=sizes[weight][0], is_tuple=False)
        for name in _NORM_SIZES:
            stated = vars(module).get(name)
            if stated is not None:
                whole = math.prod(stated) if isinstance(stated, tuple) else stated
                yield _Followed(
                    module=path, name=name, before=whole, size=sizes[weight][0], is_tuple=isinstance(stated, tuple)
                )
    yield from _model_attributes(shell, sizes)


def _model_attributes(shell: nn.Module, sizes: Mapping[str, tuple[Size, ...]]) -> Iterator[_Followed]:
    """``num_features`` and its kin, where they equal the number of the classifier's inputs."""
    get = getattr(shell, "get_classifier", None)
    classifier = get() if callable(get) else None
    path = next((path for path, module in shell.named_modules() if module is classifier), None)
    if not isinstance(classifier, nn.Linear) or path is None:
        return
    for name in ("num_features", "head_hidden_size", "embed_dim"):
        if vars(shell).get(name) == classifier.in_features:
            yield _Followed(
                module="", name=name, before=classifier.in_features, size=sizes[f"{path}.weight"][1], is_tuple=False
            )
