"""Run a model's own forward once without data and record what happens to axes.

Two modes are stacked: a dispatch mode (aten operators → rules) and a function mode (Python calls, where ints still
know their origin). No data is touched (`prunecli.graph.axes.dry`). Int attributes of modules are replaced by
`TracedInt` for the time of the trace; the model is left exactly as it was found.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from prunecli.errors import UnsupportedError
from prunecli.graph.axes.calls import HANDLERS, READ_BY_RULE, TRANSPARENT
from prunecli.graph.axes.dry import Dry, DryFunctions, DryOperators, dry
from prunecli.graph.axes.ints import Attribute, TracedInt, untraced
from prunecli.graph.axes.record import ModuleCall, Record, TensorAxes, tensors_in
from prunecli.graph.axes.rules import WHOLE_CALLS, apply_rule
from prunecli.models.outputs import tensors_of

INPUT = "it is an axis of the network's input"
OUTPUT = "it is an axis of the network's output (classes)"

_GET_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
#: Module attributes that belong to nn.Module itself.
_NOT_OWN = frozenset({"training", "_version", "call_super_init", "dump_patches"})


class _Functions(DryFunctions):
    """Reads the int arguments of Python-level calls, and hands out shapes that know their axes."""

    def __init__(self, record: Record, operators: DryOperators, dry_run: Dry) -> None:
        super().__init__(operators, dry_run)
        self.record = record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if func == _GET_SHAPE:
            return self.record.traced_size(args[0])
        if name == "size":
            dim = untraced(args[1] if len(args) > 1 else (kwargs or {}).get("dim"))
            shape = self.record.traced_size(args[0])
            return shape if dim is None else shape[dim]
        if name in {"numel", "nelement"}:
            return math.prod(self.record.traced_size(args[0]))
        if name == "__len__":
            return self.record.traced_size(args[0])[0].pinned()  # type: ignore[attr-defined]
        return super().__torch_function__(func, types, args, kwargs)

    def call(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one call on plain ints, and read from the traced ones what they size."""
        known = name in HANDLERS or name in READ_BY_RULE
        plain_args = tuple(untraced(list(args), pin=not known))
        plain_kwargs = untraced(dict(kwargs), pin=not known)
        if not known and name not in WHOLE_CALLS and _hides_sizes(func, name):
            self._distrust(name, tensors_in([args, kwargs]))
        self.record.request = (name, args, kwargs)
        try:
            out = super().call(func, name, plain_args, plain_kwargs)
            handler = HANDLERS.get(name)
            if handler is not None:
                handler(self.record, args, kwargs, out)
        finally:
            self.record.request = ("", (), {})
        return out

    def _distrust(self, name: str, tensors: list[Tensor]) -> None:
        """Freeze the inputs of a Python function that may size tensors out of sight."""
        for tensor in tensors:
            self.record.freeze(
                self.record.dims(tensor), f"{self.record.place} calls {name!r}, whose inside is not followed"
            )


def _hides_sizes(func: Any, name: str) -> bool:
    """Whether a call is a Python function whose body may size tensors by ints that it computes itself.

    The methods of torch's own tensor class are thin wrappers, and the functions of `TRANSPARENT` are known.
    """
    return isinstance(func, types.FunctionType) and func.__module__ != "torch._tensor" and name not in TRANSPARENT


def _trace_attributes(record: Record) -> None:
    """Replace every int (and tuple or list of ints) attribute of a module by one that remembers its name."""
    for path, module in record.modules.items():
        for name, value in list(module.__dict__.items()):
            if name in _NOT_OWN:
                continue
            if type(value) is int:
                module.__dict__[name] = _trace_int(record, Attribute(path, name), value)
            elif type(value) in (tuple, list) and value and all(type(item) is int for item in value):
                items = [_trace_int(record, Attribute(path, name, i), item) for i, item in enumerate(value)]
                module.__dict__[name] = type(value)(items)


def _trace_int(record: Record, attribute: Attribute, value: int) -> TracedInt:
    """A traced int for an attribute, whose value is recorded."""
    record.attributes[attribute] = value
    return TracedInt.of(value, attribute, record.ledger)


def _watch_features(model: nn.Module, record: Record) -> None:
    """Record the outputs of ``forward_features``, where the model has that method."""
    method = getattr(model, "forward_features", None)
    if not callable(method):
        return

    def watched(*args: Any, **kwargs: Any) -> Any:
        features = method(*args, **kwargs)
        record.features = _values_of(record, features)
        return features

    model.__dict__["forward_features"] = watched


def _values_of(record: Record, tensors: Any) -> list[TensorAxes]:
    """The values of all tensors in nested containers."""
    with torch._C.DisableTorchFunction():  # noqa: SLF001 - shapes read by the record are no part of the program
        return [record.peek(t) for t in tensors_in(tensors)]


@contextmanager
def _module_stack(record: Record) -> Iterator[None]:
    """Record the path of the running module, and inputs and outputs of each module's first call."""
    paths = {id(module): path for path, module in record.modules.items()}

    def enter(module: nn.Module, inputs: Any) -> None:
        record.stack.append(paths.get(id(module), record.module))
        call = record.module_calls.setdefault(record.module, ModuleCall())
        if not call.inputs:
            call.inputs = _values_of(record, inputs)

    def leave(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
        call = record.module_calls[record.module]
        if not call.outputs:
            call.outputs = _values_of(record, outputs)
        record.stack.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace(model: nn.Module, input_size: tuple[int, int, int]) -> Record:
    """Run a model on one image without data and record its axes.

    Args:
        model: the model, on any device, meta included, in any dtype; traced in eval mode and left as it was.
        input_size: channels, height, width of the image.

    Raises:
        UnsupportedError: the forward does not run without data (its path depends on it); names module and op.
    """
    try:
        return _attempt(model, input_size, fake=False)
    except UnsupportedError:
        return _attempt(model, input_size, fake=True)


def _attempt(model: nn.Module, input_size: tuple[int, int, int], *, fake: bool) -> Record:
    """One trace, on meta tensors or on torch's ``fake`` tensors. Raises UnsupportedError."""
    record = Record(model, fake=fake)
    with dry(model, input_size, record.shapes) as dry_run:

        def run(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            record.operator = function.overloadpacket.__name__  # an error has to name the operator that raised it
            return dry_run.run(function, args, kwargs)

        _trace_attributes(record)
        _watch_features(model, record)
        record.put_input(dry_run.image, INPUT)
        operators = DryOperators(run, partial(apply_rule, record))
        with operators, _Functions(record, operators, dry_run), _module_stack(record):
            outputs = _forward(model, dry_run.image, record)
    for tensor in outputs:
        record.freeze(record.dims(tensor), OUTPUT)
    return record


def _forward(model: nn.Module, image: Tensor, record: Record) -> list[Tensor]:
    """The outputs of the model. Raises UnsupportedError, with the place, for whatever the forward raises."""
    try:
        return tensors_of(model(image))
    except Exception as error:  # a model's forward may raise anything
        reason = str(error).strip().splitlines()
        raise UnsupportedError(
            f"{record.place} cannot be traced: operator {record.operator!r} failed"
            f" ({type(error).__name__}{': ' + reason[0] if reason else ''}).",
            hint="Its path depends on data, or it does not take an image of this size.",
        ) from error
