"""Building a model from a reference, without weights: everything that calls ``timm.create_model``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import is_model, split_model_name_tag
from torch import nn
from torch.overrides import TorchFunctionMode

from prunecli.errors import PruneError, one_line

# Importing it registers the papers' networks, as importing timm does its own. It stands here and nowhere else, because
# every way to a model by name leads through this module.
from prunecli.models import paper_nets as _registered  # noqa: F401
from prunecli.values.plan import ModelRef

_DEFAULT_SIZE = (3, 224, 224)  # as timm's, where nothing is known
OWN_ARGS = frozenset({"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"})


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """The images that a model expects, in the words of timm's ``pretrained_cfg``.

    Attributes:
        size: channels, height and width of an image.
        mean: mean of each channel that is subtracted, for pixels in [0, 1].
        std: standard deviation of each channel that is divided by.
        interpolation: name of the resampling filter.
        crop_pct: share of the resized image's side that the centre crop keeps.
        crop_mode: timm's name of the cropping.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"


def build(ref: ModelRef) -> nn.Module:
    """The plain timm module of a reference, on the CPU, in eval mode, without loading or initialising weights.

    Parameter values are undefined (memory as the allocator hands it out); buffers hold what timm's constructor
    computes.

    Raises:
        PruneError: the installed timm does not know the architecture or its arguments.
    """
    args = {"num_classes": ref.num_classes, **ref.args}
    arch = split_model_name_tag(ref.name)[0]
    if own := sorted(OWN_ARGS & set(args)):
        raise PruneError(f"The reference of {ref.name} sets {own[0]!r}, which could read files; refused.")
    if not is_model(arch):
        raise PruneError(
            f"The installed timm {timm.__version__} does not know {arch!r}.",
            hint=f"The model was built with {ref.timm}.",
        )
    try:
        return create(arch if ref.pretrained_cfg else ref.name, ref.pretrained_cfg or None, args, initialise=False)
    except (TypeError, ValueError, AssertionError) as error:
        raise PruneError(
            f"timm {timm.__version__} cannot build {ref.name} with {args}: {one_line(error)}.",
            hint=f"The model was built with timm {ref.timm}.",
        ) from error


def input_spec(ref: ModelRef) -> InputSpec:
    """The preprocessing of a reference: timm's ``resolve_data_config`` on its pretrained_cfg.

    The arguments ``in_chans`` and ``img_size`` are applied. Where the number of channels changes, ``mean`` and ``std``
    become their average over channels.
    """
    known = ref.pretrained_cfg or ({} if ref.is_function else timm.get_pretrained_cfg(ref.name).to_dict())
    cfg = resolve_data_config(pretrained_cfg={"input_size": _DEFAULT_SIZE, **tuples(known)})
    channels, height, width = cfg["input_size"]
    channels = ref.args.get("in_chans", channels)
    if (size := ref.args.get("img_size")) is not None:
        height, width = (size, size) if isinstance(size, int) else size
    return InputSpec(
        size=(channels, height, width),
        mean=_per_channel(cfg["mean"], channels),
        std=_per_channel(cfg["std"], channels),
        interpolation=cfg["interpolation"],
        crop_pct=cfg["crop_pct"],
        crop_mode=cfg["crop_mode"],
    )


# ---------------------------------------------------------------------------------------------- building


class _SkipInit(TorchFunctionMode):
    """While active, in-place writes that initialise a parameter do nothing; buffers are computed as ever.

    Building vit_base takes 0.01 s instead of 0.9 s. The meta device would save no more, and would lose the values of
    the buffers that are in no state_dict (position tables, attention masks).
    """

    SKIPPED = frozenset(
        {"uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"}
        | {"xavier_normal_", "orthogonal_", "constant_", "ones_", "zeros_", "zero_", "fill_"}
        | {"erfinv_", "mul_", "add_", "clamp_"}  # the steps of a truncated normal
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor")
        if isinstance(first, nn.Parameter) and getattr(func, "__name__", "") in self.SKIPPED:
            return first
        return func(*args, **kwargs)


def create(
    name: str,
    cfg: Mapping[str, Any] | None,
    args: Mapping[str, Any],
    *,
    initialise: bool,
    pretrained: bool = False,
    seed: int = 0,
) -> nn.Module:
    """``timm.create_model`` that leaves the caller's random state alone; the module comes in eval mode.

    Args:
        name: timm architecture, with or without tag.
        cfg: pretrained_cfg to use instead of timm's own, or ``None``.
        args: keyword arguments of the architecture.
        initialise: ``False`` leaves parameters as the allocator hands them out.
        pretrained: ``True`` lets timm load the weights.
        seed: seed for whatever starts at random.
    """
    with torch.random.fork_rng(devices=[]), contextlib.nullcontext() if initialise else _SkipInit():
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(
            name, pretrained=pretrained, pretrained_cfg=tuples(cfg) if cfg else None, **tuples(args)
        )
    return model.eval()


# ---------------------------------------------------------------------------------------------- small values


def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with lists as tuples: JSON has no tuples, timm's own configs and arguments do."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels
