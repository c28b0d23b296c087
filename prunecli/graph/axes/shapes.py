"""Operators without values: outputs have the right shape, strides and dtype, and lie on the meta device.

Torch's own `FakeTensorMode` does this too and knows more (devices, operators without a meta kernel), for five to ten
times the time. Here every tensor that is not on the meta device has a *stand-in* there, and an operator that gives new
tensors runs once for each layout of its inputs: networks repeat themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_META = torch.device("meta")
#: Gives new tensors by its schema, but in the memory of its input, which the record of in-place operators asks for.
_SHARES_MEMORY = "_unsafe_view"
#: Elementwise in effect, but without the tag (in some releases of torch, or in place).
_UNTAGGED = frozenset(
    {"where", "floor_divide", "masked_fill", "clamp", "hardsigmoid", "hardswish", "lerp", "addcmul", "mish", "softplus"}
    | {"logical_not", "bitwise_and", "prelu", "_prelu_kernel", "dropout", "isnan", "leaky_relu", "elu", "celu", "selu"}
    | {"gelu", "hardtanh", "relu6", "threshold", "rrelu"}
)
#: Key that differs for two calls of one operator whose outputs may differ in layout; only ever compared.
_Key = Any
#: Shape, strides and dtype of a tensor, or those of each output in a list.
_Layout = Any


@dataclass(frozen=True, kw_only=True)
class _Traits:
    """Properties of an operator's outputs, from its schema.

    Attributes:
        returns_first: whether it writes to its first argument, element by element, and returns that.
        fresh: whether all its outputs are new tensors.
        elementwise: whether it is fresh, and each output entry comes from the entries at the same place.
        takes_device: whether it has a ``device`` argument.
    """

    returns_first: bool
    fresh: bool
    elementwise: bool
    takes_device: bool


class Shapes:
    """Runs operators on stand-ins. One object serves all runs of one model.

    Args:
        stored: ids of the tensors that live as long as this object (parameters, buffers): each gets one stand-in, so
            that all readers see what is written to it.
    """

    def __init__(self, stored: Container[int]) -> None:
        self._stored = stored
        self._stand_ins: dict[int, Tensor] = {}
        self._traits: dict[Any, _Traits] = {}
        self._layouts: dict[_Key, _Layout] = {}

    def run(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The outputs of an operator on the meta device.

        Args:
            function: the aten operator, with its overload.
            args: positional arguments; tensors on any device.
            kwargs: keyword arguments.
        """
        traits = self._traits.get(function)
        if traits is None:
            traits = self._traits[function] = _traits_of(function)
        if traits.returns_first:
            return self._stand_in(args[0])
        if not traits.fresh:
            return self._compute(function, args, kwargs, traits)
        plain = _common_shape(args) if traits.elementwise and not kwargs else None
        if plain is not None:
            return self._elementwise(function, args, plain, traits)
        key = (function, _key(args), *((name, _key(value)) for name, value in kwargs.items()))
        layout = self._layouts.get(key)
        if layout is None:
            written = _WRITTEN_OUT.get(function)
            out = written and written(args)
            if out is None:
                out = self._compute(function, args, kwargs, traits)
            self._layouts[key] = _layout(out)
            return out
        return _empty(layout)

    def _elementwise(self, function: Any, args: tuple[Any, ...], shape: torch.Size, traits: _Traits) -> Any:
        """An elementwise operator on contiguous tensors of one shape: only the output's dtype has to be found out."""
        key = (function, "elementwise", *(arg.dtype if isinstance(arg, Tensor) else _key(arg) for arg in args))
        dtype = self._layouts.get(key)
        if dtype is not None:
            return torch.empty(shape, dtype=dtype, device=_META)
        out = self._compute(function, args, {}, traits)
        if isinstance(out, Tensor) and out.shape == shape and out.is_contiguous():
            self._layouts[key] = out.dtype
        return out

    def _compute(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], traits: _Traits) -> Any:
        """Run an operator on stand-ins."""
        if traits.takes_device:
            kwargs = {**kwargs, "device": _META}
        return function(*self._on_meta(args), **{name: self._on_meta(value) for name, value in kwargs.items()})

    def _on_meta(self, value: Any) -> Any:
        """An argument with stand-ins in place of tensors."""
        if isinstance(value, Tensor):
            return value if value.is_meta else self._stand_in(value)
        if isinstance(value, list | tuple):
            return type(value)([self._on_meta(item) for item in value])
        return value

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """A tensor of the same layout on the meta device; always the same one for a stored tensor."""
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self._stored:
            return _empty(_layout(tensor))
        if id(tensor) not in self._stand_ins:
            self._stand_ins[id(tensor)] = _empty(_layout(tensor))
        return self._stand_ins[id(tensor)]


def is_elementwise(function: Any) -> bool:
    """Whether each output entry of an aten operator comes from the entries of its inputs at the same place."""
    return torch.Tag.pointwise in function.tags or function.overloadpacket.__name__.rstrip("_") in _UNTAGGED


def _traits_of(function: Any) -> _Traits:
    """The traits of an aten operator."""
    schema = function._schema  # noqa: SLF001 - an operator's schema has no public name
    first = schema.arguments[0].alias_info if schema.arguments else None
    elementwise = is_elementwise(function)
    gives_tensors = bool(schema.returns) and all(str(given.type) == "Tensor" for given in schema.returns)
    shares = any(given.alias_info is not None for given in schema.returns)
    fresh = gives_tensors and not shares and not schema.is_mutable
    return _Traits(
        returns_first=elementwise and len(schema.returns) == 1 and first is not None and first.is_write,
        fresh=fresh and function.overloadpacket.__name__ != _SHARES_MEMORY,
        elementwise=elementwise and fresh,
        takes_device=any(argument.name == "device" for argument in schema.arguments),
    )


def _common_shape(args: Sequence[Any]) -> torch.Size | None:
    """The shape that all tensors among ``args`` share, if all are contiguous and it has a dimension at least."""
    shape = None
    for arg in args:
        if isinstance(arg, Tensor):
            if not arg.is_contiguous() or shape not in {None, arg.shape}:
                return None
            shape = arg.shape
    return shape or None


def _key(value: Any) -> _Key:
    """The part of an argument that decides the layout of the outputs."""
    if isinstance(value, Tensor):
        return _layout(value)
    if isinstance(value, list | tuple):
        return tuple([_key(item) for item in value])
    return type(value), value


def _layout(out: Any) -> _Layout:
    """The layout of a tensor or of each tensor in a list."""
    return (out.shape, out.stride(), out.dtype) if isinstance(out, Tensor) else [_layout(item) for item in out]


def _empty(layout: _Layout) -> Any:
    """Tensors of this layout on the meta device."""
    if isinstance(layout, list):
        return tuple([_empty(item) for item in layout])
    shape, strides, dtype = layout
    return torch.empty_strided(shape, strides, dtype=dtype, device=_META)


def _batch_norm(args: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """Outputs of a batch norm in evaluation mode, whose saved statistics are empty; ``None`` for any other."""
    x, training = args[0], args[5]
    if training or not x.is_contiguous():
        return None
    return torch.empty(x.shape, dtype=x.dtype, device=_META), *(torch.empty(0, device=_META) for _ in range(2))


def _layer_norm(args: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """Outputs of a layer norm: the result, then mean and reciprocal spread of each row; ``None`` if not contiguous."""
    x, inner = args[0], len(args[1])
    if not x.is_contiguous():
        return None
    outer = (*x.shape[: x.dim() - inner], *[1] * inner)
    return torch.empty(x.shape, dtype=x.dtype, device=_META), *(torch.empty(outer, device=_META) for _ in range(2))


#: Norms of contiguous tensors, whose meta kernels do the arithmetic step by step in Python.
_WRITTEN_OUT: dict[Any, Callable[[Sequence[Any]], tuple[Tensor, ...] | None]] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.native_layer_norm.default: _layer_norm,
}
