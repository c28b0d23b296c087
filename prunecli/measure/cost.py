"""What a model costs, by counting and without a clock: parameters, multiply-adds, bytes.

Conventions: one multiply-add counts once (half of a FLOP counter's figure), for one image, attention matmuls included;
convolutions, matrix products and attention count, additions, norms and activations do not. Nothing is computed: the
forward pass runs on fake tensors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunecli.errors import UnsupportedError
from prunecli.models.tensors import clear_caches_, named_tensors
from prunecli.values.plan import Cost


def measure(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Parameters, multiply-adds of one image in eval mode, and bytes of the tensors in the state_dict.

    Shared tensors count once, as safetensors stores them once. The model is left as it is.

    Args:
        model: any classifier, on any device.
        input_size: channels, height and width of an image.

    Raises:
        UnsupportedError: the multiply-adds depend on the values of the input (see ``count_macs``).
    """
    # by identity, so that a shared tensor counts once; a module's extra state need not be a tensor
    stored = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return Cost(
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=count_macs(model, input_size),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in stored.values()),
    )


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-adds of one image through ``model`` in eval mode.

    Args:
        model: any classifier, on any device.
        input_size: channels, height and width of an image.

    Raises:
        UnsupportedError: what the model computes depends on the values of its input; names the module.
    """
    # The copy shares the memory: only modules are copied, so that caches filled with fake tensors are thrown away. Its
    # parameters need no gradient: torch's module tracker fails on those that are handed to a module as an argument.
    shell = copy.deepcopy(model, {id(t): _without_gradient(t) for t in named_tensors(model).values()}).eval()
    clear_caches_(shell)
    like = next((p for p in shell.parameters() if p.is_floating_point()), torch.empty(0))
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: _lstm_flops})
    with (
        torch.no_grad(),
        # Written out as matrix products, which every torch version counts; fused CPU attention is not known to all.
        sdpa_kernel(SDPBackend.MATH),
        _without_fast_path(),
        FakeTensorMode(allow_non_fake_inputs=True),
        counter,
    ):
        try:
            shell(torch.empty(1, *input_size, dtype=like.dtype, device=like.device))
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
            place = max(counter.mod_tracker.parents - {"Global"}, key=len, default=type(model).__name__)
            raise UnsupportedError(f"{place} cannot be followed: its path depends on the data ({error}).") from error
    return int(counter.get_total_flops()) // 2


def _lstm_flops(steps: Sequence[int], inputs: Sequence[int], hidden: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of an LSTM layer in one direction, which torch's counter lacks; off the CPU it is matrix products.

    Args:
        steps: shape of the layer's input, ``[steps, batch, features]``.
        inputs: shape of the weight of the inputs.
        hidden: shape of the weight of the hidden state.
    """
    return 2 * math.prod(steps[:-1]) * (math.prod(inputs) + math.prod(hidden))


def _without_gradient(tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor.detach(), requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Disable torch's fused attention fast path, whose multiply-adds FlopCounterMode does not count.

    It computes a whole ``nn.MultiheadAttention`` or transformer layer in one operator.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
