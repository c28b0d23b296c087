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
from torch.utils.hooks import RemovableHandle

from prunecli.models.channels import silencing_slices
from prunecli.models.outputs import as_rows
from prunecli.models.tensors import clear_caches_, map_tensors_, named_tensors
from prunecli.surgery.cut import cut_, require_fit
from prunecli.values.groups import AttributeEdit, ScaleFold, module_of
from prunecli.values.plan import PlannedGroup, removed_positions

# What a forward pass of a wrongly cut module raises: torch's shape errors and timm's own asserts.
_FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError)
_LEAST_VARIANCE = 1e-2  # of a batch norm's channel, relative to the mean of its channels
# Calibrated batch norms make small differences grow with depth (arXiv 1902.08129: gradients explode), in the deepest
# nets until rounding reads like a mistake. Nets that are one function agree under any statistics, others under none:
# above this error the drawn ones are asked too, which keep differences small, where they leave the cut visible.
_ROUNDING = 1e-10
_PLAIN_EFFECT = 1e-3
_BLIND = 1e-9  # relative change of the output below which the check cannot see what it is to judge
_DRAWS = 4  # parameters are drawn this often before a group that no output depends on counts as unseen


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """Outcome of the check.

    Attributes:
        relative_error: ``max|pruned - silenced| / max|silenced|`` over two images; inf where the check failed to run
            or could not see.
        exact: no norm statistic runs over a cut axis, so silencing is zeroing and nothing else.
        norms: modules whose statistic was taken over kept channels on the dense side.
        reason: why ``relative_error`` is inf, else empty.
        unseen: cut groups of which the check sees nothing, where that is the reason.
    """

    relative_error: float
    exact: bool
    norms: tuple[str, ...]
    reason: str = ""
    unseen: tuple[str, ...] = ()


class _FailedCheckError(Exception):
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
        model: with real (not meta) tensors; left as it is, but for the caches that an earlier forward pass filled.
        groups: of the plan; uncut ones are ignored.
        attributes: of the plan.
        folds: of the plan.
        input_size: channels, height, width.
        seed: of parameters and images.

    Raises:
        UnsupportedError: the plan does not fit the model (see ``cut_``).
    """
    require_fit(model, groups=groups, attributes=attributes, folds=folds)
    compare = partial(_compared, model, groups=groups, attributes=attributes, folds=folds, input_size=input_size)
    worst, unseen = 0.0, {group.name for group in groups if group.is_cut}
    for draw in range(_DRAWS):  # a squeeze of two ReLUs is as often dead as not: other parameters may wake it
        found = compare(seed=seed + draw, calibrated=True, least_effect=_BLIND)
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

    ``calibrated`` batch norms see their own statistics, else drawn ones; ``least_effect`` is the relative change of the
    output that silencing has to make.
    """
    cut = tuple(group for group in groups if group.is_cut)
    norms = tuple(sorted({norm for group in cut for norm in group.norms}))
    generator = torch.Generator().manual_seed(seed)
    clear_caches_(model)
    net = _double_copy(model)
    _redraw_(net, generator)
    images = torch.randn(2, *input_size, generator=generator, dtype=torch.float64)
    whole = _dense_outputs_(net, images, calibrated=calibrated)
    for part in silencing_slices(net, cut):
        part.zero_()
    try:
        expected = _silenced_outputs(net, cut, norms, images)
        if cut:
            _assert_visible(whole, expected, least_effect)
        clear_caches_(net)
        cut_(net, groups=groups, attributes=attributes, folds=folds)
        worst = _difference(expected, net, images)
        if _without_fused_attention_(net):
            worst = max(worst, _difference(expected, net, images))
        unseen = _unseen_in_training(net, cut, images, seed)
    except _FailedCheckError as failure:
        return Equivalence(relative_error=math.inf, exact=not norms, norms=norms, reason=str(failure))
    return Equivalence(relative_error=worst, exact=not norms, norms=norms, unseen=unseen)


def gating_error(
    model: nn.Module,
    gated: Callable[[nn.Module], nn.Module],
    *,
    groups: Sequence[PlannedGroup],
    input_size: tuple[int, int, int],
    seed: int,
) -> float:
    """How far a net with its gates closed on what a plan removes is from the net with those channels silenced.

    ``max|gated - silenced| / max|silenced|`` as in ``equivalence_error``; inf where the gated net cannot be run.

    Args:
        model: left as it is, but for caches.
        gated: puts the closed gates around a copy of it.
        groups: of the plan, without norms over their channels.
        input_size: channels, height, width.
        seed: of parameters and images.
    """
    generator = torch.Generator().manual_seed(seed)
    clear_caches_(model)
    net = _double_copy(model)
    _redraw_(net, generator)
    images = torch.randn(2, *input_size, generator=generator, dtype=torch.float64)
    _dense_outputs_(net, images, calibrated=True)
    behind = gated(net).eval()
    try:
        with torch.no_grad():
            found = _outputs(behind, images)
        for part in silencing_slices(net, groups):
            part.zero_()
        expected = _silenced_outputs(net, tuple(groups), (), images)
    except (_FailedCheckError, *_FORWARD_ERRORS):
        return math.inf
    return (found - expected).abs().max().item() / expected.abs().max().item()


# ---------------------------------------------------------------------------------------------- the two sides


def _double_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU in float64, in eval mode; floating parameters come without values, they are drawn anew."""
    empty = {
        id(parameter): nn.Parameter(torch.empty(parameter.shape, dtype=torch.float64), parameter.requires_grad)
        for parameter in model.parameters()
        if parameter.is_floating_point()
    }
    copied = copy.deepcopy(model, dict(empty)).cpu().eval()
    map_tensors_(copied, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    return copied


@torch.no_grad()
def _redraw_(model: nn.Module, generator: torch.Generator) -> None:
    """New values for parameters and running statistics; other buffers are tables, masks or positions and stay.

    Weights get variance 1 / fan-in, one-dimensional scales lie in [0.5, 1.5], biases and means are small.
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
def _dense_outputs_(dense: nn.Module, images: Tensor, *, calibrated: bool) -> Tensor:
    """The dense outputs; where ``calibrated``, batch norms take the statistics of these images on the way.

    With drawn ones the signal may fade over many layers, until rounding is all there is to compare.
    """
    with _Calibrated() if calibrated else nullcontext():
        return _outputs(dense, images)


def _without_fused_attention_(model: nn.Module) -> bool:
    """Switch every module with that flag to its explicit attention; whether there was one."""
    fused = [module for module in model.modules() if vars(module).get("fused_attn") is True]
    for module in fused:
        vars(module)["fused_attn"] = False
    return bool(fused)


# ---------------------------------------------------------------------------------------------- comparing


@torch.no_grad()
def _silenced_outputs(
    silenced: nn.Module, cut: tuple[PlannedGroup, ...], norms: Sequence[str], images: Tensor
) -> Tensor:
    """What the pruned net should give, [images, values], with every declared norm masked.

    Raises _FailedCheckError where a norm was not masked, or the outputs would tell nothing.
    """
    with _MaskedNorms(silenced, cut, norms) as masked:
        outputs = _outputs(silenced, images)
    unseen = set(masked.masks) - masked.seen
    if unseen:
        raise _FailedCheckError(f"the statistic of {min(unseen)} could not be taken over the kept channels")
    scale = outputs.abs().max().item()
    if not math.isfinite(scale):
        raise _FailedCheckError("the output is not finite")
    if (outputs[0] - outputs[1]).abs().max().item() <= _BLIND * scale:
        raise _FailedCheckError("the output does not depend on the image, so the check sees nothing")
    return outputs


def _assert_visible(whole: Tensor, expected: Tensor, least_effect: float) -> None:
    """Raise _FailedCheckError where silencing changes nothing: a wrong cut would then change nothing either."""
    if (expected - whole).abs().max().item() <= least_effect * whole.abs().max().item():
        raise _FailedCheckError("silencing the removed channels changes no output, so the check sees nothing")


@torch.no_grad()
def _difference(expected: Tensor, pruned: nn.Module, images: Tensor) -> float:
    """Largest difference relative to the largest expected output. Raises _FailedCheckError where there is none."""
    try:
        found = _outputs(pruned, images)
    except _FORWARD_ERRORS as error:
        raise _FailedCheckError(f"the pruned forward pass fails: {_first_line(error)}") from error
    if not torch.isfinite(found).all():
        raise _FailedCheckError("the output of the pruned net is not finite")
    if found.shape != expected.shape:
        raise _FailedCheckError(f"the output has shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    return (found - expected).abs().max().item() / expected.abs().max().item()


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    """All output tensors as one, [images, values]; images in float64 stay so on their way."""
    with _StayDouble() if images.dtype is torch.float64 else nullcontext():
        return as_rows(model(images), len(images))


class _StayDouble(TorchFunctionMode):
    """Reads single precision as double: a model that computes its attention in float32 whatever comes in
    (``q.float()``) would be compared to seven digits only, which hides small mistakes and refuses right cuts.
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
    _FailedCheckError where gradients are not finite.
    """
    map_tensors_(pruned, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    pruned.train().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        effects = _effects(pruned, images.float())
    bad = [name for name, effect in effects.items() if not math.isfinite(effect)]
    if bad or not effects:
        raise _FailedCheckError(f"the pruned net has no finite gradient at {bad[0] if bad else 'any parameter'}")
    unseen = _unseen(cut, effects)
    if unseen:  # a branch may be dropped at random in train mode
        unseen = _unseen(cut, _effects(pruned.eval(), images.float()))
    return unseen


def _effects(model: nn.Module, images: Tensor) -> dict[str, float]:
    """What each parameter contributes to the outputs to first order, ``max|gradient * value|``; unused ones left out.

    Raises _FailedCheckError where forward or backward fails.
    """
    model.zero_grad()
    try:
        loss = _outputs(model, images).square().mean()
        torch.autograd.backward(loss)
    except _FORWARD_ERRORS as error:
        raise _FailedCheckError(f"the pruned net does not train: {_first_line(error)}") from error
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: (p.grad * p.detach()).abs().max().item() for name, p in parameters if p.grad is not None}


def _unseen(cut: Sequence[PlannedGroup], effects: Mapping[str, float]) -> tuple[str, ...]:
    """The groups of whose parameters none contributes anything."""
    least = _BLIND * max(effects.values(), default=0.0)
    return tuple(
        group.name for group in cut if all(effects.get(member.tensor, 0.0) <= least for member in group.members)
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class _Calibrated(TorchFunctionMode):
    """Batch norms take their running mean and variance from what they are given, then use them."""

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


# ---------------------------------------------------------------------------------------------- norms over cut axes


class _MaskedNorms(TorchFunctionMode):
    """Takes the statistics of given norm modules over kept channels only, and puts zeros at the others.

    ``layer_norm``, ``group_norm`` and ``rms_norm`` are computed here with a mask; in norms written out in Python
    (global response norm) each mean or variance over the axis is restricted; weight standardisation, which is a
    ``batch_norm`` over a weight's input side, likewise. ``seen`` says for which modules that happened.
    """

    def __init__(self, model: nn.Module, cut: tuple[PlannedGroup, ...], norms: Sequence[str]) -> None:
        super().__init__()
        self.masks = {norm: _kept_mask(model, norm, cut) for norm in norms}
        self.seen: set[str] = set()
        self._within: list[str] = []
        self._hooks: list[RemovableHandle] = []
        for path, module in model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(lambda *_, path=path: self._within.append(path)))
            self._hooks.append(module.register_forward_hook(lambda *_: self._leave()))

    def _leave(self) -> None:
        self._within.pop()

    def __exit__(self, *raised: object) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        path = self._within[-1] if self._within else None
        rule = _RULES.get(func)
        if rule is not None and path in self.masks:
            result = rule(func, self.masks[path], args, kwargs)
            if result is not NotImplemented:
                self.seen.add(path)
                return result
        return func(*args, **kwargs)


def _kept_mask(model: nn.Module, norm: str, cut: tuple[PlannedGroup, ...]) -> Tensor:
    """1 for kept and 0 for removed positions of the normalised axis, float64.

    Read off the norm's own weight; a norm without one is taken to run over exactly its group's channels.
    """
    removed = {name: dims for name, dims in removed_positions(cut).items() if module_of(name) == norm}
    tensors = named_tensors(model)
    for name, dims in removed.items():
        dim = max(dims)  # a vector's only dimension; of a standardised weight the input side
        mask = torch.ones(tensors[name].shape[dim], dtype=torch.float64)
        mask[list(dims[dim])] = 0
        return mask
    group = next(group for group in cut if norm in group.norms)
    mask = torch.zeros(group.width, dtype=torch.float64)
    mask[list(group.keep)] = 1
    return mask


def _normalised(x: Tensor, mask: Tensor, dims: tuple[int, ...], eps: float, *, centred: bool) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` with masked statistics over ``dims``, zero where the mask is.

    Not ``centred``: the root mean square norm, ``mean = 0``.
    """
    count = mask.expand_as(x).sum(dims, keepdim=True).clamp(min=1)
    mean = (x * mask).sum(dims, keepdim=True) / count if centred else torch.zeros((), dtype=x.dtype)
    square = (((x - mean) * mask) ** 2).sum(dims, keepdim=True) / count
    return (x - mean) / torch.sqrt(square + eps) * mask


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor) -> Tensor:
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias) * mask


def _layer_norm(_func: Callable[..., Any], mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | Any:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    if tuple(given["normalized_shape"]) != tuple(mask.shape):
        return NotImplemented
    x = _normalised(given["input"], mask, (-1,), given.get("eps", 1e-5), centred=True)
    return _affine(x, given.get("weight"), given.get("bias"), mask)


def _rms_norm(_func: Callable[..., Any], mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | Any:
    given = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | kwargs
    if tuple(given["normalized_shape"]) != tuple(mask.shape):
        return NotImplemented
    eps = given.get("eps")
    x = given["input"]
    x = _normalised(x, mask, (-1,), torch.finfo(x.dtype).eps if eps is None else eps, centred=False)
    return _affine(x, given.get("weight"), None, mask)


def _group_norm(_func: Callable[..., Any], mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | Any:
    names = ("input", "num_groups", "weight", "bias", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, num_groups = given["input"], given["num_groups"]
    if x.shape[1] != len(mask):
        return NotImplemented
    grouped = x.reshape(len(x), num_groups, x.shape[1] // num_groups, -1)
    within = mask.view(1, num_groups, -1, 1)
    normed = _normalised(grouped, within, (2, 3), given.get("eps", 1e-5), centred=True).view_as(x)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    weight, bias = (None if p is None else p.view(shape) for p in (given.get("weight"), given.get("bias")))
    return _affine(normed, weight, bias, mask.view(shape))


def _standardised_weight(
    func: Callable[..., Any], mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | Any:
    """``batch_norm(weight.reshape(1, out, in * k * k))``: kept inputs only."""
    weight, *rest = args
    if weight.dim() != 3 or len(weight) != 1 or weight.shape[2] % len(mask):
        return NotImplemented
    kept = mask.bool().repeat_interleave(weight.shape[2] // len(mask))
    result = torch.zeros_like(weight)
    result[:, :, kept] = func(weight[:, :, kept], *rest, **kwargs)
    return result


def _reduction(func: Callable[..., Any], mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A mean or variance over the axis, of the kept entries; left alone where two dimensions could be the axis.

    Where a group norm has split the axis in groups and reduces inside each, the groups have to keep the same entries.
    """
    x = args[0] if args else kwargs["input"]
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dims is None or isinstance(dims, bool):
        return NotImplemented
    dims = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)]
    axes = [dim for dim in dims if x.shape[dim] == len(mask)]
    if not axes:
        axes = [d for d in dims if d and d - 1 not in dims and x.shape[d - 1] * x.shape[d] == len(mask)]
        mask = mask.view(-1, x.shape[axes[0]])[0] if len(axes) == 1 and _same_rows(mask, x.shape[axes[0]]) else mask
    if len(axes) != 1 or x.shape[axes[0]] != len(mask):
        return NotImplemented
    kept = x.index_select(axes[0], mask.nonzero().flatten())
    return func(kept, *args[1:], **{key: value for key, value in kwargs.items() if key != "input"})


def _same_rows(mask: Tensor, length: int) -> bool:
    rows = mask.view(-1, length)
    return bool((rows == rows[0]).all())


_Rule = Callable[[Callable[..., Any], Tensor, tuple[Any, ...], dict[str, Any]], Any]
_RULES: dict[Callable[..., Any], _Rule] = {
    nn.functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    nn.functional.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    nn.functional.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    nn.functional.batch_norm: _standardised_weight,
    torch.mean: _reduction,
    Tensor.mean: _reduction,
    torch.var: _reduction,
    Tensor.var: _reduction,
    torch.var_mean: _reduction,
    torch.std: _reduction,
    Tensor.std: _reduction,
    torch.std_mean: _reduction,
}
