"""Blocks of a pruned net: pieces that can be compared with the same pieces of the dense net, found for any net.

A block ends at a *waist* of the dataflow: a tensor on which alone everything behind it depends, such as a completed
residual sum. Not every waist ends a block:

* An architecture's own blocks stay whole: inside a module with code of its own and several weights, which is entered
  and left through waists, no block ends. A module that holds more than half of the net's weights is no such block, nor
  is one that is made of such blocks for more than half (a stage).
* What the dense net's tensor keeps must be known. The plan's groups say which positions of a width of D channels can
  stay as P; a cut copy with drawn weights must agree with the silenced dense net at exactly these (as in the proof of
  a cut). Where nothing agrees, the block goes on to the next waist.
* Each block reads a cut axis. Otherwise it goes on, and then up to the next weight, so that a norm and an activation
  belong to the layer before; pooling does not, as what is pooled says more of each image than the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor, nn

from prunecli.measure.dataflow import Call, Dataflow, trace
from prunecli.measure.replay import copied, hollow, recording
from prunecli.measure.segments import tensor_in
from prunecli.models.channels import silencing_slices
from prunecli.models.layers import evaluation_mode
from prunecli.models.tensors import clear_caches_, named_tensors
from prunecli.proof.equivalence import (
    FORWARD_ERRORS,
    FailedCheckError,
    dense_outputs_,
    drawn_copy,
    outputs_of,
    silenced_outputs,
)
from prunecli.surgery.cut import cut_
from prunecli.values.groups import module_of
from prunecli.values.plan import Plan, removed_positions

_SAME: Final = 1e-6  # largest difference of equal tensors in float64, relative to the largest entry
_MOST: Final = 0.5  # share of weights, see above


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The part of a dense tensor that the pruned net still has.

    Attributes:
        dim: dimension that was cut.
        positions: kept positions on it, in dense coordinates, ascending.
    """

    dim: int
    positions: tuple[int, ...]

    def of(self, dense: Tensor) -> Tensor:
        """The kept part of a tensor of the dense net."""
        return dense.index_select(self.dim, torch.tensor(self.positions, device=dense.device))


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block.

    Attributes:
        name: path of the module that it is, or of the first and last layer in it.
        end: waist at which it ends; ``None`` for the last one, which ends in the logits.
        kept: part of the dense net's tensor at the end that the pruned net has; ``None`` where that is all of it.
        parameters: names of the parameters that only this block reads.
    """

    name: str
    end: Call | None
    kept: Kept | None
    parameters: tuple[str, ...]


def find_blocks(pruned: nn.Module, dense: nn.Module, plan: Plan, images: Tensor) -> tuple[Dataflow, tuple[Block, ...]]:
    """The blocks of a net in the order in which they run, and the dataflow to which their ends belong.

    Args:
        pruned: net that was cut by ``plan`` from ``dense``, whatever its weights are.
        dense: the dense net; it is not changed.
        plan: the plan of the cut.
        images: two images ``[2, C, H, W]``.
    """
    flow = trace(pruned, images)
    weights = {name: flow.reads_of([name]) for name, p in pruned.named_parameters() if p.dim() > 1}
    waists = _between_blocks(flow, pruned, weights)
    kept = kept_parts(dense, plan, [waist.path for waist in waists], images.shape[1:])
    waists = _before_pooling([waist for waist in waists if waist.path in kept], pruned, images, weights)
    reading = {member.tensor for group in plan.cut_groups for member in group.members if member.role == "in"}
    ends = _ends(waists, flow.reads_of(reading), weights)
    bounds = [0, *(end.end for end in ends), len(flow.operators)]
    layers = sorted((times[0], module_of(name)) for name, times in weights.items() if times)
    parameters = {name: flow.reads_of([name]) for name, _ in pruned.named_parameters()}
    blocks = []
    for number, (begin, end) in enumerate(pairwise(bounds)):
        last = number == len(ends)
        inside = [path for time, path in layers if begin <= time < end]
        blocks.append(
            Block(
                name=_name(inside, [path for time, path in layers if not begin <= time < end]),
                end=None if last else ends[number],
                kept=None if last else kept[ends[number].path],
                parameters=tuple(
                    name for name, times in parameters.items() if times and begin <= times[0] and times[-1] < end
                ),
            )
        )
    return flow, tuple(blocks)


# ---------------------------------------------------------------------------------------------- where blocks end


#: The times at which each weight (a parameter of more than one dimension) is read, by name.
_Weights = Mapping[str, Sequence[int]]


def _between_blocks(flow: Dataflow, model: nn.Module, weights: _Weights) -> list[Call]:
    """The waists at which a block may end: those that do not lie inside one of the architecture's own blocks."""

    def weights_in(call: Call) -> int:
        return sum(any(call.begin <= time < call.end for time in times) for times in weights.values())

    left = {len(flow.operators), *(waist.end for waist in flow.waists)}
    whole: list[Call] = []
    for call in reversed(flow.calls):  # what is inside a call comes before it
        own_code = call.path and type(model.get_submodule(call.path)).forward is not nn.Sequential.forward
        several = 1 < weights_in(call) <= _MOST * len(weights)
        entered = len(flow.crossing(call.begin)) == 1
        if own_code and several and entered and call.end in left:
            nested = [other for other in whole if call.place < other.place <= call.place + call.inner]
            if sum(map(weights_in, nested)) <= _MOST * weights_in(call):
                whole = [other for other in whole if other not in nested] + [call]
    return [waist for waist in flow.waists if not any(call.begin < waist.end < call.end for call in whole)]


@torch.no_grad()
def _before_pooling(waists: Sequence[Call], model: nn.Module, images: Tensor, weights: _Weights) -> list[Call]:
    """The waists without those whose tensor is but a smaller one of the waist before: that says more of each image."""
    with evaluation_mode(model), recording(model, [waist.path for waist in waists], form=hollow) as returned:
        model(images)
    chosen: list[Call] = []
    for waist in waists:
        before = chosen[-1] if chosen else None
        between = before and any(before.end <= time < waist.end for times in weights.values() for time in times)
        if not before or between or tensor_in(returned[waist.path]).numel() >= tensor_in(returned[before.path]).numel():
            chosen.append(waist)
    return chosen


def _ends(waists: Sequence[Call], reads: Sequence[int], weights: _Weights) -> list[Call]:
    """The waists at which blocks end, so that each block reads a cut axis, the last one too.

    Args:
        waists: waists to choose from, ascending.
        reads: times at which layers read cut axes, ascending.
        weights: times at which weights are read.
    """
    ends: list[Call] = []
    begin = 0
    for waist in waists:
        if waist.end < begin or not any(begin <= time < waist.end for time in reads):
            continue
        if not any(time >= waist.end for time in reads):
            break
        following = min(time for times in weights.values() for time in times if time >= waist.end)
        ends.append(max((w for w in waists if w.end <= following), key=lambda w: w.end))
        begin = ends[-1].end
    return ends


def _name(inside: Sequence[str], others: Sequence[str]) -> str:
    """A name for a block, given the paths of its layers and of all others: the module that it is, or its two ends."""
    columns = zip(*(path.split(".") for path in inside), strict=False)
    common = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
    if common and not any(path.split(".")[: len(common)] == common for path in others):
        return ".".join(common)
    return " to ".join(dict.fromkeys((inside[0], inside[-1])))


# ---------------------------------------------------------------------------------------------- what stays


@torch.no_grad()
def kept_parts(dense: nn.Module, plan: Plan, paths: Sequence[str], size: Sequence[int]) -> dict[str, Kept | None]:
    """The part of what each module returns in the dense net that the pruned net has; ``None`` for all of it.

    Two copies with drawn weights are compared, one silenced and one cut. A module is left out where they do not agree,
    or agree for several choices of positions, where it returns another shape, or not one row for each image.

    Args:
        dense: the dense net.
        plan: the plan of the cut.
        paths: modules that are called once and return one tensor.
        size: channels, height and width of an image.
    """
    net, images = drawn_copy(dense, size, seed=plan.seed)
    clear_caches_(net)
    dense_outputs_(net, images, calibrated=True)
    choices = _choices(net, plan)
    for part in silencing_slices(net, plan.cut_groups):
        part.zero_()
    try:
        with recording(net, paths, form=copied) as silenced:
            silenced_outputs(net, plan.cut_groups, plan.cut_norms, images)
        clear_caches_(net)
        cut_(net, groups=plan.groups, attributes=plan.attributes, folds=plan.folds)
        with recording(net, paths, form=copied) as smaller:
            outputs_of(net, images)
    except (FailedCheckError, *FORWARD_ERRORS):  # an unproved plan; then the net is one block
        return {}
    found: dict[str, Kept | None] = {}
    for path in paths:
        fitting = _fitting(tensor_in(silenced[path]), tensor_in(smaller[path]), choices)
        if len(fitting) == 1 and len(tensor_in(smaller[path])) == len(images):
            found[path] = fitting[0]
    return found


#: By a width before and after the cut: the positions that can be the ones that stay.
_Choices = Mapping[tuple[int, int], Collection[tuple[int, ...]]]


def _choices(net: nn.Module, plan: Plan) -> _Choices:
    tensors = named_tensors(net)
    found: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for name, dims in removed_positions(plan.groups).items():
        for dim, gone in dims.items():
            width = tensors[name].shape[dim]
            found.setdefault((width, width - len(gone)), set()).add(tuple(sorted(set(range(width)) - set(gone))))
    return found


def _fitting(silenced: Tensor, smaller: Tensor, choices: _Choices) -> list[Kept | None]:
    """What can have been kept of a tensor of the silenced net, given the cut net's."""
    cut = [dim for dim, widths in enumerate(zip(silenced.shape, smaller.shape, strict=False)) if len(set(widths)) > 1]
    if silenced.dim() != smaller.dim() or len(cut) > 1:
        return []
    options: list[Kept | None] = [None]
    for dim in cut:
        widths = silenced.shape[dim], smaller.shape[dim]
        options = [Kept(dim=dim, positions=positions) for positions in choices.get(widths, ())]
    largest = float(smaller.abs().max())
    return [
        option
        for option in options
        if float(((option.of(silenced) if option else silenced) - smaller).abs().max()) <= _SAME * largest
    ]
