"""Layers with weights and what several rooms ask of them: matrices, gains, modes and attention switches.

Shapes: a convolution's weight ``[N, C / groups, height, width]``, a linear layer's ``[N, M]``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run the ``with`` block with every module in evaluation mode; each gets its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def switch_fused_attention_(model: nn.Module, *, on: bool) -> bool:
    """Set the ``fused_attn`` switch of timm's attention modules, in place.

    A fused module hands its whole attention to one kernel; otherwise it writes out the matrix products and the softmax.
    Both compute the same function.

    Args:
        model: any module; modules without the switch stay as they are.
        on: ``True`` for the fused kernel.

    Returns:
        Whether any switch was moved.
    """
    moved = [module for module in model.modules() if vars(module).get("fused_attn") is (not on)]
    for module in moved:
        vars(module)["fused_attn"] = on
    return bool(moved)


# Names of activation modules and functions (lower case, without underscores), by nn.init.calculate_gain. Sigmoids are
# left out: in vision nets they are gates on a side branch and do not sit between two weights of the main path.
_RELU_LIKE = (
    "relu", "relu6", "leakyrelu", "prelu", "rrelu", "elu", "celu", "gelu", "gelutanh", "quickgelu", "silu", "swish",
    "mish", "hardswish", "hardmish", "softplus", "starrelu", "squaredrelu",
)  # fmt: skip
_GAINS = {"tanh": 5.0 / 3.0, "selu": 0.75} | dict.fromkeys(_RELU_LIKE, math.sqrt(2.0))


def weight_matrices(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The layer's weight as one matrix for each group of channels, ``[groups, N / groups, M]``, without gradient."""
    return blocks(layer.weight.detach(), layer)


def blocks(weight: Tensor, layer: nn.Conv2d | nn.Linear) -> Tensor:
    """A tensor of the layer's weight shape as one matrix for each group of channels: ``[groups, N / groups, M]``.

    Args:
        weight: tensor shaped as the layer's weight, for example its gradient; the result is a view where possible.
        layer: layer whose ``groups`` count.
    """
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def centre(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The kernel's middle position ``[N, C / groups]``, a view of a 2d convolution's weight."""
    height, width = layer.weight.shape[2:]
    return layer.weight[:, :, height // 2, width // 2]


def restart_(module: nn.Module, layers: Iterable[nn.Conv2d | nn.Linear]) -> None:
    """Set the layers' biases to 0 and every BatchNorm to its initial state, in place.

    Args:
        module: net whose BatchNorms are reset, statistics included.
        layers: layers whose biases are set to 0.
    """
    for layer in layers:
        if layer.bias is not None:
            layer.bias.zero_()
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.reset_parameters()


def weight_layers(module: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Module path → layer for every Conv2d and Linear, in module order; a shared weight is listed once."""
    seen: set[int] = set()
    found: dict[str, nn.Conv2d | nn.Linear] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            found[name] = layer
    return found


# ---------------------------------------------------------------------------------------------- gain


def activation_gain(module: nn.Module, example: Tensor | None = None) -> float:
    """One gain for the whole net, from the activation met most often: sqrt(2) ReLU-like, 5/3 tanh, 1 for a linear net.

    Activation modules are looked up by class. Activations called as functions are invisible there, so where no module
    is found, one eval-mode forward pass records the functions that run.

    Args:
        module: any net.
        example: batch ``[B, C, H, W]`` for that pass. Without it a net that only uses functional activations counts as
            linear: pass one if in doubt.
    """
    kinds: Counter[str] = Counter(_kind(type(child).__name__) for child in module.modules())
    kinds = _known(kinds)
    if not kinds and example is not None:
        with evaluation_mode(module), torch.no_grad(), _Recorder() as recorder:
            module(example)
        kinds = _known(recorder.names)
    return _GAINS[kinds.most_common(1)[0][0]] if kinds else 1.0


def _known(kinds: Counter[str]) -> Counter[str]:
    return Counter({kind: count for kind, count in kinds.items() if kind in _GAINS})


def _kind(name: str) -> str:
    """``LeakyReLU``, ``leaky_relu_`` and timm's ``LeakyReLUMe`` are one kind."""
    return name.lower().replace("_", "").removesuffix("me").removesuffix("jit")


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # The mode is off while ``func`` runs, so F.relu is counted once although it calls torch.relu.
        self.names[_kind(getattr(func, "__name__", ""))] += 1
        return func(*args, **(kwargs or {}))
