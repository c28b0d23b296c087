"""Norms whose statistics are taken over kept channels only: the dense side of the proof of a cut.

Every rule has the signature of ``_Rule``: the function that was called, the mask ``[width]`` (1 kept, 0 removed), and
the arguments of the call. It returns the masked result, or ``NotImplemented`` where the call is not over that axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from prunecli.models.tensors import named_tensors
from prunecli.values.groups import module_of
from prunecli.values.plan import PlannedGroup, removed_positions

# ---------------------------------------------------------------------------------------------- norms over cut axes


class MaskedNorms(TorchFunctionMode):
    """Take the statistics of given norm modules over kept channels only, and put zeros at the others.

    ``layer_norm``, ``group_norm`` and ``rms_norm`` are computed here with a mask; in norms written out in Python
    (global response norm) each mean or variance over the axis is restricted; weight standardisation, which is a
    ``batch_norm`` over a weight's input side, likewise.

    Attributes:
        masks: path of a norm module → mask over its normalised axis, float64, 1 for kept channels.
        seen: paths of the modules whose statistic was masked so far.
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

    def _leave(self) -> None:  # returns nothing: what a forward hook returns replaces the output
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
    if not axes:  # a group norm's axis lies in two dimensions, [groups, channels of a group], of which one is reduced
        axes = [d for d in dims if d and d - 1 not in dims and x.shape[d - 1] * x.shape[d] == len(mask)]
        if len(axes) == 1:
            groups = mask.view(-1, x.shape[axes[0]])
            mask = groups[0] if bool((groups == groups[0]).all()) else mask
    if len(axes) != 1 or x.shape[axes[0]] != len(mask):
        return NotImplemented
    kept = x.index_select(axes[0], mask.nonzero().flatten())
    return func(kept, *args[1:], **{key: value for key, value in kwargs.items() if key != "input"})


#: ``(function, mask, args, kwargs) -> result`` or ``NotImplemented``.
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
