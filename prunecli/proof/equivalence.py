"""The independent proof of a cut: the pruned net computes what the dense net computes with those channels silenced.

One copy in float64, its parameters drawn anew so that no zero-initialised branch hides a mistake, is first silenced: it
keeps all shapes and attributes and only gets zeros. Then ``surgery`` cuts that very copy, whose kept entries silencing
has not touched. The two share no code but the list of positions: a wrong index map, a forgotten attribute or a stale
attention scale shows, and so does a cut that removes anything but the zeros. One copy, because large models fill the
memory: twelve bytes a parameter, the model's own four included.

Where a norm's statistic runs over a cut axis the zeros would take part in it: there the dense side computes that
statistic over the kept channels, with its own masked implementation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunecli.errors import one_line
from prunecli.models.channels import silencing_slices
from prunecli.models.layers import switch_fused_attention_
from prunecli.models.outputs import as_rows
from prunecli.models.tensors import clear_caches_, map_tensors_
from prunecli.proof.masked_norms import MaskedNorms
from prunecli.surgery.cut import cut_, require_fit
from prunecli.values.groups import AttributeEdit, ScaleFold
from prunecli.values.plan import PlannedGroup

# What a forward pass of a wrongly cut module raises: torch's shape errors and timm's own asserts.
FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError)
_LEAST_VARIANCE = 1e-2  # of a batch norm's channel, relative to the mean of its channels
_ROUNDING = 1e-10  # relative error above which a second comparison, under drawn statistics, has to confirm it
_PLAIN_EFFECT = 1e-3  # relative change of the output by silencing that such a comparison needs
_BLIND = 1e-9  # relative change of the output below which the check cannot see what it is to judge
_DRAWS = 4  # parameters are drawn this often before a group that no output depends on counts as unseen


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """Outcome of the check.

    Attributes:
        relative_error: ``max|pruned - silenced| / max|silenced|`` over two images; infinite where the check could not
            run, or no output depends on what was cut.
        exact: ``True`` where no norm statistic runs over a cut axis, so that silencing is zeroing and nothing else.
        norms: paths of the modules whose statistic was taken over kept channels on the dense side.
        reason: explanation of an infinite ``relative_error``, else empty.
        unseen: names of the cut groups on which no output depends, where that is the reason.
    """

    relative_error: float
    exact: bool
    norms: tuple[str, ...]
    reason: str = ""
    unseen: tuple[str, ...] = ()


class FailedCheckError(Exception):
    """The comparison could not be made; the message says why."""


def equivalence_error(
    model: nn.Module,
    *,
    groups: Sequence[PlannedGroup],
    attributes: Sequence[AttributeEdit],
    folds: Sequence[ScaleFold],
    input_size: tuple[int, int, int],
    seed: int,
) -> Equivalence:
    """Compare the pruned with the silenced net on two random images, in float64 on the CPU, with random parameters.

    Where modules have a ``fused_attn`` switch, both paths of the pruned net are compared. The pruned net must also
    train: a forward and backward pass in train mode has to give finite gradients.

    Args:
        model: dense net with real (not meta) tensors; it is left as it is, but for the caches that an earlier forward
            pass filled.
        groups: planned groups; uncut ones are ignored.
        attributes: attribute edits of the plan.
        folds: attention scales of the plan.
        input_size: channels, height and width of an image.
        seed: seed of parameters and images.

    Raises:
        UnsupportedError: the plan does not fit the model (see ``cut_``).
    """
    require_fit(model, groups=groups, attributes=attributes, folds=folds)
    compare = partial(_compared, model, groups=groups, attributes=attributes, folds=folds, input_size=input_size)
    worst, unseen = 0.0, {group.name for group in groups if group.is_cut}
    for draw in range(_DRAWS):  # a squeeze of two ReLUs is as often dead as not: other parameters may wake it
        found = compare(seed=seed + draw, calibrated=True, least_effect=_BLIND)
        # Calibrated batch norms make small differences grow with depth (gradients explode, arXiv 1902.08129), in the
        # deepest nets until rounding looks like a mistake. Nets that are one function agree under any statistics,
        # others under none: so compare under drawn statistics too, which keep differences small.
        if _ROUNDING < found.relative_error < math.inf:
            again = compare(seed=seed + draw, calibrated=False, least_effect=_PLAIN_EFFECT)
            found = min(found, again, key=lambda outcome: outcome.relative_error)
        worst = max(worst, found.relative_error)
        unseen.intersection_update(found.unseen)
        if not unseen or worst == math.inf:
            return replace(found, relative_error=worst, unseen=())
    names = tuple(group.name for group in groups if group.name in unseen)
    reason = f"no channel of {names[0]} changes an output, so the check sees nothing of it"
    return replace(found, relative_error=math.inf, reason=reason, unseen=names)


def _compared(
    model: nn.Module,
    *,
    groups: Sequence[PlannedGroup],
    attributes: Sequence[AttributeEdit],
    folds: Sequence[ScaleFold],
    input_size: tuple[int, int, int],
    seed: int,
    calibrated: bool,
    least_effect: float,
) -> Equivalence:
    """One comparison under the parameters that ``seed`` draws; ``unseen`` are the groups without a gradient there.

    Args:
        model: dense net.
        groups: planned groups.
        attributes: attribute edits of the plan.
        folds: attention scales of the plan.
        input_size: channels, height and width of an image.
        seed: seed of parameters and images.
        calibrated: ``True`` for batch norms with the statistics of these images, ``False`` for drawn statistics.
        least_effect: relative change of the output that silencing has to make.
    """
    cut = tuple(group for group in groups if group.is_cut)
    norms = tuple(sorted({norm for group in cut for norm in group.norms}))
    clear_caches_(model)
    net, images = drawn_copy(model, input_size, seed=seed)
    whole = dense_outputs_(net, images, calibrated=calibrated)
    for part in silencing_slices(net, cut):
        part.zero_()
    try:
        expected = silenced_outputs(net, cut, norms, images)
        if cut:
            _assert_visible(whole, expected, least_effect)
        clear_caches_(net)
        cut_(net, groups=groups, attributes=attributes, folds=folds)
        worst = _difference(expected, net, images)
        if switch_fused_attention_(net, on=False):
            worst = max(worst, _difference(expected, net, images))
        unseen = _unseen_in_training(net, cut, images, seed)
    except FailedCheckError as failure:
        return Equivalence(relative_error=math.inf, exact=not norms, norms=norms, reason=str(failure))
    return Equivalence(relative_error=worst, exact=not norms, norms=norms, unseen=unseen)


# ---------------------------------------------------------------------------------------------- the two sides


def double_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU in float64, in eval mode; floating parameters have no values yet (see `redraw_`)."""
    # deepcopy takes what its memo holds for copied, so that the values of large models are never copied
    empty = {
        id(parameter): nn.Parameter(torch.empty(parameter.shape, dtype=torch.float64), parameter.requires_grad)
        for parameter in model.parameters()
        if parameter.is_floating_point()
    }
    copied = copy.deepcopy(model, dict(empty)).cpu().eval()
    map_tensors_(copied, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    return copied


def drawn_copy(model: nn.Module, input_size: Sequence[int], *, seed: int) -> tuple[nn.Module, Tensor]:
    """A copy of a net as of `double_copy` with drawn parameters, and two random images ``[2, C, H, W]`` in float64.

    Args:
        model: net of any precision.
        input_size: channels, height and width of an image.
        seed: seed of parameters and images.
    """
    generator = torch.Generator().manual_seed(seed)
    net = double_copy(model)
    redraw_(net, generator)
    return net, torch.randn(2, *input_size, generator=generator, dtype=torch.float64)


@torch.no_grad()
def redraw_(model: nn.Module, generator: torch.Generator) -> None:
    """Draw new values for parameters and running statistics, in place; other buffers (tables, masks) stay.

    Weights get variance 1 / fan-in, one-dimensional scales lie in [0.5, 1.5], biases and means are small.

    Args:
        model: net on the CPU.
        generator: source of the random numbers.
    """

    def normal(tensor: Tensor, std: float) -> Tensor:
        return std * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    def around_one(tensor: Tensor) -> Tensor:
        return 0.5 + torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)

    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if name.endswith("bias"):
            parameter.copy_(normal(parameter, 0.1))
        elif parameter.dim() < 2:
            parameter.copy_(around_one(parameter))
        else:
            parameter.copy_(normal(parameter, (parameter.numel() / len(parameter)) ** -0.5))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(normal(buffer, 0.1))
        elif name.endswith("running_var"):
            buffer.copy_(around_one(buffer))


@torch.no_grad()
def dense_outputs_(dense: nn.Module, images: Tensor, *, calibrated: bool) -> Tensor:
    """The dense net's outputs ``[images, values]``.

    Args:
        dense: net in eval mode; calibrating changes its running statistics.
        images: batch ``[B, C, H, W]``.
        calibrated: ``True`` to let batch norms take the statistics of these images on the way. With drawn statistics
            the signal may fade over many layers, until rounding is all there is to compare.
    """
    with _Calibrated() if calibrated else nullcontext():
        return outputs_of(dense, images)


# ---------------------------------------------------------------------------------------------- comparing


@torch.no_grad()
def silenced_outputs(
    silenced: nn.Module, cut: tuple[PlannedGroup, ...], norms: Sequence[str], images: Tensor
) -> Tensor:
    """The outputs ``[images, values]`` that the pruned net should have.

    Args:
        silenced: dense net whose removed channels are zero.
        cut: groups that lose channels.
        norms: paths of the norms whose statistic is taken over kept channels.
        images: batch ``[B, C, H, W]``.

    Raises:
        FailedCheckError: a norm was not masked, or the outputs are not finite or do not depend on the image.
    """
    with MaskedNorms(silenced, cut, norms) as masked:
        outputs = outputs_of(silenced, images)
    unseen = set(masked.masks) - masked.seen
    if unseen:
        raise FailedCheckError(f"the statistic of {min(unseen)} could not be taken over the kept channels")
    scale = outputs.abs().max().item()
    if not math.isfinite(scale):
        raise FailedCheckError("the output is not finite")
    if (outputs[0] - outputs[1]).abs().max().item() <= _BLIND * scale:
        raise FailedCheckError("the output does not depend on the image, so the check sees nothing")
    return outputs


def _assert_visible(whole: Tensor, expected: Tensor, least_effect: float) -> None:
    """Raise FailedCheckError where silencing changes nothing: a wrong cut would then change nothing either."""
    if (expected - whole).abs().max().item() <= least_effect * whole.abs().max().item():
        raise FailedCheckError("silencing the removed channels changes no output, so the check sees nothing")


@torch.no_grad()
def _difference(expected: Tensor, pruned: nn.Module, images: Tensor) -> float:
    """Largest difference relative to the largest expected output. Raises FailedCheckError where there is none."""
    try:
        found = outputs_of(pruned, images)
    except FORWARD_ERRORS as error:
        raise FailedCheckError(f"the pruned forward pass fails: {one_line(error)}") from error
    if not torch.isfinite(found).all():
        raise FailedCheckError("the output of the pruned net is not finite")
    if found.shape != expected.shape:
        raise FailedCheckError(f"the output has shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    return (found - expected).abs().max().item() / expected.abs().max().item()


def outputs_of(model: nn.Module, images: Tensor) -> Tensor:
    """All output tensors as one, ``[images, values]``; for float64 images nothing is computed in single precision.

    Args:
        model: net in eval or train mode.
        images: batch ``[B, C, H, W]``.
    """
    with _StayDouble() if images.dtype is torch.float64 else nullcontext():
        return as_rows(model(images), len(images))


class _StayDouble(TorchFunctionMode):
    """Replace every request for single precision by double.

    A model that computes its attention in float32 whatever comes in (``q.float()``) would be compared to seven digits
    only, which hides small mistakes and refuses right cuts.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wider = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*(torch.float64 if arg is torch.float32 else arg for arg in args), **wider)


def _unseen_in_training(pruned: nn.Module, cut: Sequence[PlannedGroup], images: Tensor, seed: int) -> tuple[str, ...]:
    """Forward and backward in train mode, in float32. Leaves the global generator alone.

    Returns the cut groups without a gradient: had they been cut wrongly, no output would have shown it. Raises
    FailedCheckError where gradients are not finite.
    """
    map_tensors_(pruned, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    pruned.train().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        effects = _effects(pruned, images.float())
    bad = [name for name, effect in effects.items() if not math.isfinite(effect)]
    if bad or not effects:
        raise FailedCheckError(f"the pruned net has no finite gradient at {bad[0] if bad else 'any parameter'}")
    unseen = _unseen(cut, effects)
    if unseen:  # a branch may be dropped at random in train mode
        unseen = _unseen(cut, _effects(pruned.eval(), images.float()))
    return unseen


def _effects(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Parameter → its contribution to the outputs to first order, ``max|gradient * value|``; unused ones are left out.

    Raises FailedCheckError where forward or backward fails.
    """
    model.zero_grad()
    try:
        loss = outputs_of(model, images).square().mean()
        torch.autograd.backward(loss)
    except FORWARD_ERRORS as error:
        raise FailedCheckError(f"the pruned net does not train: {one_line(error)}") from error
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: (p.grad * p.detach()).abs().max().item() for name, p in parameters if p.grad is not None}


def _unseen(cut: Sequence[PlannedGroup], effects: Mapping[str, float]) -> tuple[str, ...]:
    """Names of the groups of whose parameters none contributes anything."""
    least = _BLIND * max(effects.values(), default=0.0)
    return tuple(
        group.name for group in cut if all(effects.get(member.tensor, 0.0) <= least for member in group.members)
    )


class _Calibrated(TorchFunctionMode):
    """Let batch norms take their running mean and variance from their input, then use them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.batch_norm:
            given = dict(zip(("input", "running_mean", "running_var"), args, strict=False)) | kwargs
            x, mean, variance = given["input"], given.get("running_mean"), given.get("running_var")
            if mean is not None and variance is not None:
                over = [d for d in range(x.dim()) if d != 1]
                mean.copy_(x.mean(over))
                # Channels that hardly vary are not blown up: their rounding errors would be as well.
                spread = x.var(over, correction=0)
                variance.copy_(spread.clamp(min=_LEAST_VARIANCE * spread.mean().item()))
        return func(*args, **kwargs)
