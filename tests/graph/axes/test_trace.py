"""Tracing leaves the model exactly as it was, takes any device and dtype, and refuses with the place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunecli.errors import ExitCode, UnsupportedError
from prunecli.graph.axes.trace import trace
from prunecli.graph.build import build_graph
from toys.blocks import INPUT, Attention, Inverted, Residual, Stack


def contents(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Every module's state: values by identity for tensors, by type and value for the rest."""

    def frozen(value: Any) -> Any:
        if isinstance(value, Tensor | nn.Module):
            return id(value)
        if isinstance(value, dict):
            return {key: frozen(item) for key, item in value.items()}
        return (type(value), [frozen(v) for v in value]) if isinstance(value, list | tuple) else (type(value), value)

    return [(path, {k: frozen(v) for k, v in vars(m).items()}) for path, m in model.named_modules()]


class Caching(nn.Module):
    """Fills caches of all kinds during its forward."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv, self.out_chs = nn.Conv2d(chs, width, 1), width
        self.cache: dict[str, Tensor] = {}
        self.seen: list[int] = [1, 2]
        self.fused_attn = False

    def forward(self, x: Tensor) -> Tensor:
        self.cache["bias"] = self.conv.bias * 2
        self.seen.append(3)
        self.last = x
        return self.conv(x)


def test_the_model_is_left_as_it_was() -> None:
    model = Stack([Attention, Caching, Inverted, Residual], [4, 4, 4, 4]).train()
    model.blocks[2].eval()
    before, weights = contents(model), copy.deepcopy(model.state_dict())
    build_graph(model, INPUT)
    assert contents(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_model_is_left_as_it_was_when_the_trace_fails() -> None:
    class Failing(Caching):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("no")

    model = Stack([Failing], [4])
    before = contents(model)
    with pytest.raises(UnsupportedError):
        build_graph(model, INPUT)
    assert contents(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_gives_the_same_groups(dtype: torch.dtype) -> None:
    model = Stack([Attention, Inverted], [4, 4])
    assert build_graph(copy.deepcopy(model).to(dtype), INPUT).groups == build_graph(model, INPUT).groups


def test_a_model_on_the_meta_device_gives_the_same_graph() -> None:
    with torch.device("meta"):
        model = Stack([Attention, Inverted], [4, 4])
    real = build_graph(Stack([Attention, Inverted], [4, 4]), INPUT)
    graph = build_graph(model, INPUT)
    assert (graph.groups, graph.frozen, graph.ops, graph.folds) == (real.groups, real.frozen, real.ops, real.folds)
    assert all(p.is_meta for p in model.parameters())


def test_a_path_that_depends_on_data_is_refused_with_its_place() -> None:
    class Data(nn.Module):
        def __init__(self, chs: int, width: int) -> None:
            super().__init__()
            self.conv, self.out_chs = nn.Conv2d(chs, width, 1), width

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(UnsupportedError, match=r"module 'blocks\.0' cannot be traced: operator '\w+' failed") as error:
        build_graph(Stack([Data], [4]), INPUT)
    assert error.value.exit_code is ExitCode.UNSUPPORTED
    assert error.value.hint


def test_an_image_of_the_wrong_size_is_refused_with_its_place() -> None:
    with pytest.raises(UnsupportedError, match="module 'stem' cannot be traced: operator 'convolution' failed"):
        build_graph(Stack([Residual], [4]), (4, 8, 8))


def test_no_global_hook_stays_behind() -> None:
    hooks = nn.modules.module
    trace(Stack([Residual], [4]), INPUT)
    assert not hooks._global_forward_pre_hooks
    assert not hooks._global_forward_hooks


def test_a_weight_used_in_two_places_is_one_tensor_with_two_names() -> None:
    class Tied(nn.Module):
        def __init__(self, chs: int, width: int) -> None:
            super().__init__()
            self.one, self.two, self.out_chs = nn.Conv2d(chs, chs, 1), nn.Conv2d(chs, chs, 1), chs
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(self.one(x))

    members = build_graph(Stack([Tied], [4]), INPUT).group("stem").members
    for name in ("blocks.0.one.weight", "blocks.0.two.weight"):
        assert [(m.dim, m.role) for m in members if m.tensor == name] == [(0, "out"), (1, "in")]
