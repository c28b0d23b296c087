"""Activations: inputs and outputs of layers while images run through a net.

A *row* is the channels at one position of one sample: a convolution's ``[B, C, H, W]`` gives ``B*H*W`` rows of ``C``, a
linear layer's ``[..., C]`` one for each leading index. Callers sum rows in float64 batch by batch, so that no
activation is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Layer = nn.Conv2d | nn.Linear
#: Called with the first input and the output of a layer.
See = Callable[[Tensor, Tensor], None]


class StopPass(Exception):  # noqa: N818 (not an error: the rest of a forward pass is not needed)
    """Ends a forward pass."""


def rows(layer: Layer, values: Tensor) -> Tensor:
    """Inputs or outputs of a layer as rows ``[n, C]`` in float64.

    Args:
        layer: the layer, whose kind decides where the channels are.
        values: ``[B, C, H, W]`` of a convolution, ``[..., C]`` of a linear layer.
    """
    last = values.movedim(1, -1) if isinstance(layer, nn.Conv2d) else values
    return last.detach().reshape(-1, last.shape[-1]).double()


def own_layers(model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """The Conv2d and Linear whose weight is a parameter of theirs alone, and why others are not among them.

    Returns:
        The layers by module path, in module order; and the reason by module path for every other Conv2d and Linear.
    """
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    own: dict[str, Layer] = {}
    others: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        if "weight" not in dict(module.named_parameters(recurse=False)):
            others[name] = "its weight is computed from other tensors"
        elif holders[id(module.weight)] > 1:
            others[name] = "its weight is shared"
        else:
            own[name] = module
    return own, others


@contextmanager
def _watching(model: nn.Module, see: Mapping[str, See]) -> Iterator[None]:
    """While this is open, every call of a module named in ``see`` is passed on with its first input and output."""

    def hook(seen: See) -> Callable[..., None]:
        return lambda _, inputs, output: seen(inputs[0], output)

    handles = [model.get_submodule(name).register_forward_hook(hook(seen)) for name, seen in see.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def watch(model: nn.Module, images: Tensor, see: Mapping[str, See], *, alone: bool = False) -> None:
    """Run one forward pass in the model's present mode and observe named modules.

    Args:
        model: the net to run.
        images: input of the net ``[B, C, H, W]``.
        see: callback for every call of a module, by module path.
        alone: whether to end the pass with the first call observed; for one module that is called once.
    """

    def last(seen: See) -> See:
        def then_stop(given: Tensor, made: Tensor) -> None:
            seen(given, made)
            raise StopPass

        return then_stop

    with _watching(model, {name: last(seen) for name, seen in see.items()} if alone else see):
        try:
            model(images)
        except StopPass:
            return


def call_order(model: nn.Module, names: Iterable[str], images: Tensor) -> tuple[str, ...]:
    """Module paths in the order of their calls in one forward pass; one called twice appears twice.

    Args:
        model: the net to run.
        names: paths of the modules to observe.
        images: input of the net ``[B, C, H, W]``.
    """
    order: list[str] = []

    def append(name: str) -> See:
        return lambda _, __: order.append(name)

    watch(model, images, {name: append(name) for name in names})
    return tuple(order)


def uncalled_once(order: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """The reason by name, for each of ``names`` that does not appear exactly once in ``order``.

    Args:
        order: module paths from ``call_order``.
        names: module paths to check.
    """
    calls = Counter(order)
    reasons = {0: "the forward pass does not call it as a module"}
    return {name: reasons.get(calls[name], "it is called several times") for name in names if calls[name] != 1}


@torch.no_grad()
def nonlinear_in_weight(model: nn.Module, layers: Mapping[str, Layer], images: Tensor) -> dict[str, str]:
    """The reason by name, for each layer whose output is not linear in its weight (one that standardises it).

    Plain Conv2d and Linear are linear; a subclass is tried on the inputs it gets.

    Args:
        model: the net to run.
        layers: layers of the net by module path.
        images: input of the net ``[B, C, H, W]``.
    """
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> See:
        def seen(given: Tensor, _: Tensor) -> None:
            inputs[name] = given

        return seen

    suspects = {name: layer for name, layer in layers.items() if type(layer) not in {nn.Conv2d, nn.Linear}}
    if not suspects:
        return {}
    watch(model, images, {name: keep(name) for name in suspects})
    reason = "its output is not linear in its weight"
    return {name: reason for name, given in inputs.items() if not _is_linear(suspects[name], given)}


def _is_linear(layer: Layer, given: Tensor) -> bool:
    """Whether doubling the weight changes the output as doubling the input does (both leave the bias alone)."""
    once = layer(given)
    by_weight = functional_call(layer, {"weight": layer.weight * 2}, (given,)) - once
    by_input = layer(given * 2) - once
    return torch.allclose(by_weight, by_input, rtol=1e-3, atol=1e-4 * float(by_input.abs().max()))


class _Uses(TorchFunctionMode):
    """Counts by id how many computations take a tensor; reading its shape does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        self.alive: list[Any] = []  # so that no id is given out twice

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.alive.append((args, kwargs))
            self.counts.update({id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)})
        return result


@torch.no_grad()
def following_norms(model: nn.Module, images: Tensor) -> dict[str, str]:
    """By layer, the BatchNorm that alone reads the layer's output, for the layers that have one.

    Only BatchNorm with running statistics counts, and only where both are called once: shifting and scaling the layer's
    output then equals shifting and scaling the running statistics.

    Args:
        model: the net to run.
        images: input of the net ``[B, C, H, W]``.
    """
    outputs: dict[str, Tensor] = {}  # kept until the end, so that their ids stay theirs
    inputs: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def note(name: str, held: dict[str, Tensor], place: int) -> See:
        def seen(*tensors: Tensor) -> None:
            calls[name] += 1
            held[name] = tensors[place]

        return seen

    see: dict[str, See] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            see[name] = note(name, outputs, 1)
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            see[name] = note(name, inputs, 0)
    with _Uses() as uses:
        watch(model, images, see)
    norm_of = {id(given): name for name, given in inputs.items() if calls[name] == 1}
    return {
        name: norm_of[id(made)]
        for name, made in outputs.items()
        if calls[name] == 1 and id(made) in norm_of and uses.counts[id(made)] == 1
    }
