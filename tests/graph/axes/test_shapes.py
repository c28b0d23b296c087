"""Operators without values: what they give has the layout that the operator itself gives, however often it is asked."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunecli.errors import UnsupportedError
from prunecli.graph.axes import dry, record
from prunecli.graph.axes.shapes import Shapes, is_elementwise
from prunecli.graph.build import build_graph
from toys.blocks import BLOCKS, INPUT, Block, Conv, Inverted, Stack

aten = torch.ops.aten
IMAGE = torch.randn(2, 4, 6, 5)
CHANNELS_LAST = IMAGE.contiguous(memory_format=torch.channels_last)
ROWS = torch.randn(3, 8)
VECTOR = torch.randn(8)
NORM = (torch.randn(4), torch.randn(4), torch.randn(4), torch.rand(4))
CALLS: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...] = (
    (aten.add.Tensor, (IMAGE, IMAGE), {}),
    (aten.add.Tensor, (IMAGE, CHANNELS_LAST), {}),
    (aten.add.Tensor, (ROWS, VECTOR), {}),
    (aten.mul.Tensor, (ROWS, ROWS.double()), {}),
    (aten.mul.Tensor, (ROWS.to(torch.int32), 2), {}),
    (aten.mul.Tensor, (ROWS.to(torch.int32), 2.0), {}),
    (aten.mul.Tensor, (ROWS.half(), torch.tensor(2.0, dtype=torch.float64)), {}),
    (aten.gt.Scalar, (ROWS, 0), {}),
    (aten.where.self, (ROWS > 0, ROWS, ROWS.double()), {}),
    (aten.relu.default, (IMAGE,), {}),
    (aten.relu.default, (CHANNELS_LAST,), {}),
    (aten.relu.default, (ROWS.t(),), {}),
    (aten.gelu.default, (IMAGE,), {"approximate": "tanh"}),
    (aten.hardswish_.default, (IMAGE.clone(),), {}),
    (aten.add_.Tensor, (IMAGE.clone(), NORM[0].view(4, 1, 1)), {}),
    (aten.clone.default, (CHANNELS_LAST,), {"memory_format": torch.contiguous_format}),
    (aten._to_copy.default, (ROWS,), {"dtype": torch.float64}),
    (aten.convolution.default, (IMAGE, torch.randn(6, 2, 3, 3), None, [2, 1], [1, 1], [1, 1], False, [0, 0], 2), {}),
    (aten.native_batch_norm.default, (IMAGE, *NORM, False, 0.1, 1e-5), {}),
    (aten.native_batch_norm.default, (CHANNELS_LAST, *NORM, False, 0.1, 1e-5), {}),
    (aten.native_layer_norm.default, (ROWS, [8], VECTOR, VECTOR, 1e-5), {}),
    (aten.native_layer_norm.default, (IMAGE, [6, 5], None, None, 1e-5), {}),
    (aten.native_layer_norm.default, (IMAGE.permute(0, 2, 3, 1), [4], *NORM[:2], 1e-5), {}),
    (aten.addmm.default, (VECTOR, ROWS, torch.randn(8, 8)), {}),
    (aten.bmm.default, (torch.randn(2, 3, 4), torch.randn(2, 4, 5)), {}),
    (aten.cat.default, ([IMAGE, IMAGE[:, :1]], 1), {}),
    (aten.mean.dim, (IMAGE, [2, 3], True), {}),
    (aten.mean.dim, (IMAGE, [2, 3], False), {}),
    (aten.sum.dim_IntList, (ROWS > 0, [1]), {}),
    (aten.max.dim, (IMAGE, 1), {}),
    (aten.topk.default, (ROWS, 3), {}),
    (aten.max_pool2d_with_indices.default, (IMAGE, [2, 2]), {}),
    (aten.view.default, (IMAGE, [2, 4, 30]), {}),
    (aten.permute.default, (IMAGE, [0, 2, 3, 1]), {}),
    (aten.expand.default, (ROWS[:, None], [3, 2, 8]), {}),
    (aten.split.Tensor, (ROWS, 3, 1), {}),
    (aten.index.Tensor, (ROWS, [torch.tensor([2, 0])]), {}),
    (aten.embedding.default, (ROWS, torch.tensor([[0, 2]])), {}),
    (aten._unsafe_view.default, (ROWS, [4, 6]), {}),
    (aten.arange.default, (5,), {}),
    (aten.zeros.default, ([2, 3],), {"dtype": torch.int64}),
    (aten.new_ones.default, (ROWS.double(), [3]), {}),
    (aten.empty_like.default, (CHANNELS_LAST,), {}),
)


def layout(function: Any, out: Any) -> list[Any]:
    """Shapes, strides and dtypes of what an operator gives; the by-products of norms follow the device, not here."""
    tensors = record.tensors_in(out)[: 1 if "norm" in str(function) else None]
    return [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]


@pytest.mark.parametrize(("function", "args", "kwargs"), CALLS, ids=[str(call[0]) for call in CALLS])
def test_the_layout_is_that_of_the_operator_also_when_it_is_remembered(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    shapes = Shapes(frozenset())
    expected = layout(function, function(*args, **kwargs))
    for _ in range(2):
        out = shapes.run(function, args, kwargs)
        assert layout(function, out) == expected
        assert all(tensor.is_meta for tensor in record.tensors_in(out))


def test_one_object_keeps_all_these_calls_apart() -> None:
    """Calls that differ in a number, a type, a stride or a dtype alone are not taken for one another."""
    shapes = Shapes(frozenset())
    for _ in range(2):
        for function, args, kwargs in CALLS:
            expected = layout(function, function(*args, **kwargs))
            assert layout(function, shapes.run(function, args, kwargs)) == expected, function


def test_a_stored_tensor_has_one_stand_in_and_its_views_share_memory() -> None:
    table, other = torch.randn(3, 4), torch.randn(3, 4)
    shapes = Shapes({id(table)})
    first, second = (shapes.run(aten.view.default, (table, [12]), {}) for _ in range(2))
    written = shapes.run(aten.mul_.Tensor, (table, 2), {})
    memory = {tensor.untyped_storage()._cdata for tensor in (first, second, written)}
    assert len(memory) == 1
    x = torch.empty(2, 3, device="meta")
    for view in (aten.view.default, aten._unsafe_view.default):
        assert shapes.run(view, (x, [6]), {}).untyped_storage()._cdata == x.untyped_storage()._cdata
    constant = [shapes.run(aten.view.default, (other, [12]), {}) for _ in range(2)]
    assert constant[0].untyped_storage()._cdata != constant[1].untyped_storage()._cdata
    assert not table.is_meta


def test_an_operator_in_place_returns_its_tensor() -> None:
    shapes, x = Shapes(frozenset()), torch.empty(2, 3, device="meta")
    assert shapes.run(aten.relu_.default, (x,), {}) is x
    assert shapes.run(aten.masked_fill_.Scalar, (x, torch.ones(3, dtype=torch.bool), 0), {}) is x


def test_elementwise_operators_are_those_torch_says_and_some_it_does_not() -> None:
    assert all(map(is_elementwise, (aten.add.Tensor, aten.relu_.default, aten.hardswish.default, aten.where.self)))
    assert not any(map(is_elementwise, (aten.mm.default, aten.cat.default, aten.squeeze_.default, aten.mean.dim)))


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.item(),
        bool,
        lambda t: t.tolist(),
        lambda t: [0, 1, 2][t.long()],
        lambda t: torch.equal(t, t + 1),
        lambda t: t.expand(3)[t.expand(3) > 0],
        torch.nonzero,
        lambda t: t.numpy(),
    ],
)
def test_no_value_is_ever_made_up(read: Callable[[Tensor], Any]) -> None:
    class Reads(nn.Module):
        def __init__(self, chs: int, width: int) -> None:
            super().__init__()
            self.conv, self.out_chs = nn.Conv2d(chs, width, 1), width

        def forward(self, x: Tensor) -> Tensor:
            read(x.sum())
            return self.conv(x)

    with pytest.raises(UnsupportedError):
        build_graph(Stack([Reads], [4]), INPUT)


def test_a_forward_that_meta_tensors_cannot_run_runs_on_fake_ones() -> None:
    class Literal(nn.Module):
        """Takes a number out of a tensor made in the forward: torch's fake tensors keep such constants."""

        def __init__(self, chs: int, width: int) -> None:
            super().__init__()
            self.conv, self.out_chs = nn.Conv2d(chs, width, 3, padding=1), width

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x)) * torch.tensor(0.5).item()

    graph, plain = build_graph(Stack([Literal], [4]), INPUT), build_graph(Stack([Conv], [4]), INPUT)
    assert graph.groups == plain.groups
    assert graph.frozen == plain.frozen


@pytest.mark.parametrize("block", BLOCKS, ids=[block.__name__ for block in BLOCKS])
def test_meta_and_fake_tensors_give_the_same_graph(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Stack([block], [4])
    fast = build_graph(model, INPUT)
    monkeypatch.setattr(record, "Shapes", lambda _: None)
    runs: list[Any] = []
    fake = dry.FakeTensorMode
    monkeypatch.setattr(dry, "FakeTensorMode", lambda **args: runs.append(args) or fake(**args))
    slow = build_graph(model, INPUT)
    assert runs
    for part in ("groups", "frozen", "ties", "exclusive", "tensors", "folds", "unknown_ops"):
        assert getattr(fast, part) == getattr(slow, part)
    assert [op.extents for op in fast.ops] == [op.extents for op in slow.ops]


def test_tensors_say_that_they_lie_where_the_model_does() -> None:
    seen: list[Any] = []

    class Asks(nn.Module):
        def __init__(self, chs: int, width: int) -> None:
            super().__init__()
            self.conv, self.out_chs = nn.Conv2d(chs, width, 1), width

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x) + torch.zeros(1, device=x.device)
            seen.append((x.device.type, y.device.type, x.is_cpu, y.is_meta, y.is_cuda))
            return y

    build_graph(Stack([Asks], [4]), INPUT)
    assert set(seen) == {("cpu", "cpu", True, False, False)}


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        build_graph(Stack([Inverted], [4]), INPUT)
        with pytest.raises(UnsupportedError):
            build_graph(Stack([Inverted], [4]), (4, 8, 8))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()
