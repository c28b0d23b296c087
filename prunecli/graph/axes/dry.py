"""Running a model's own forward without values, on a model that is left exactly as it was found.

Operators run on meta tensors (`Shapes`), which is fast; a forward that cannot, because it runs into code that compares
devices, or into an operator torch has no meta kernel for, runs on torch's fake tensors. Two modes watch the run: one
sees every operator, the other every Python-level call, of which some count as one operator whatever they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from prunecli.graph.axes.record import Call, tensors_in
from prunecli.graph.axes.rules import WHOLE_CALLS, run_whole
from prunecli.graph.axes.rules.registry import words
from prunecli.graph.axes.shapes import Shapes
from prunecli.models.layers import switch_fused_attention_

#: Runs an operator: ``(function, args, kwargs) -> outputs``.
Runner = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]

#: Operators that carry no axis from an input to an output.
_SILENT_OPERATORS = words(
    "device _local_scalar_dense item is_contiguous is_pinned sym_size sym_numel sym_stride set_ is_same_size equal",
    "_assert_async _assert_tensor_metadata",
)
#: Properties that reveal the device of a tensor, beside ``device`` itself.
_DEVICE_FLAGS = words("is_cpu is_cuda is_meta is_mps is_xpu")


@dataclass(frozen=True, kw_only=True)
class Dry:
    """What a forward without values is made with.

    Attributes:
        run: function that runs one operator.
        image: input of the model ``[1, channels, height, width]``.
        place: the device on which new tensors have to be made.
        device: the device that tensors claim to lie on: what a program does may depend on it.
    """

    run: Runner
    image: Tensor
    place: torch.device
    device: torch.device

    def property_of(self, getter: Any, tensor: Tensor) -> Any:
        """A property of a tensor, by its ``__get__``; stand-ins on the meta device claim to lie on ``device``."""
        name = getter.__self__.__name__
        if name == "device" and tensor.is_meta:
            return self.device
        if name in _DEVICE_FLAGS and tensor.is_meta:
            return name == f"is_{self.device.type}"
        return getter(tensor)


@contextmanager
def dry(model: nn.Module, input_size: tuple[int, int, int], shapes: Shapes | None) -> Iterator[Dry]:
    """A model in eval mode, on its fused attention path, ready to be run without values; put back at the end.

    Args:
        model: the model, on any device, meta included, in any dtype.
        input_size: channels, height, width of one image.
        shapes: runner of operators on meta tensors; ``None`` runs the model on torch's fake tensors.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    place = first.device if shapes is None else torch.device("meta")
    with ExitStack() as stack:
        stack.enter_context(_as_found(model))
        model.eval()
        # Which path a module takes depends on the machine it is built on, so the cut has to be right for both. The
        # fused one needs more care (its scale follows the head width); what keeps it true keeps the other one true.
        switch_fused_attention_(model, on=True)
        stack.enter_context(torch.no_grad())
        if shapes is None:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        image = torch.empty(1, *input_size, dtype=first.dtype, device=place)
        run = (lambda function, args, kwargs: function(*args, **kwargs)) if shapes is None else shapes.run
        yield Dry(run=run, image=image, place=place, device=first.device)


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Put back every module's state: attributes, parameters, buffers, and caches filled on the way."""
    attributes = [module.__dict__ for module in model.modules()]
    before = [own.copy() for own in attributes]
    values = [value for own in before for value in own.values()]
    dicts = [
        *zip(attributes, before, strict=True),
        *((value, dict(value)) for value in values if isinstance(value, dict)),
    ]
    lists = [(value, list(value)) for value in values if isinstance(value, list)]
    try:
        yield
    finally:
        for own, content in dicts:
            if own or content:
                own.clear()
                own.update(content)
        for held, items in lists:
            held[:] = items


class DryOperators(TorchDispatchMode):
    """Runs every operator without values and hands its call over.

    Operators that carry no axis, and those inside a call that counts as one, are only run.

    Args:
        run: function that runs one operator.
        handle: callback for each call, after it ran.
    """

    def __init__(self, run: Runner, handle: Callable[[Call], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run = run
        self.handle = handle
        self.paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = self.run(func, args, kwargs)
        name = func.overloadpacket.__name__
        if not self.paused and name not in _SILENT_OPERATORS and tensors_in(out):
            self.handle(Call(name=name, function=func, args=args, kwargs=kwargs, out=out))
        return out


class DryFunctions(TorchFunctionMode):
    """Runs every Python-level call: `WHOLE_CALLS` as one operator, and properties as on the model's own device.

    Args:
        operators: the mode of the same run that sees operators.
        dry_run: image, runner and devices of the run.
    """

    def __init__(self, operators: DryOperators, dry_run: Dry) -> None:
        super().__init__()
        self.operators = operators
        self.dry = dry_run

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self.dry.property_of(func, args[0])
        return self.call(func, name, args, kwargs or {})

    def call(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one call that is no property.

        Args:
            func: the Python-level function.
            name: the function's name.
            args: positional arguments.
            kwargs: keyword arguments.
        """
        if name not in WHOLE_CALLS:
            return func(*args, **kwargs)
        self.operators.paused = True
        try:
            out = run_whole(func, name, args, kwargs)
        finally:
            self.operators.paused = False
        self.operators.handle(Call(name=name, function=func, args=args, kwargs=kwargs, out=out))
        return out
