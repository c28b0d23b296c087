"""Sparse orthogonal starts: the graph's degrees, orthonormality, what a ReLU pair sees, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunecli.errors import UsageError
from prunecli.methods.initialisation import initialise_
from prunecli.methods.sao import Initialised, Pattern, initialise_sao_, mirrored, regular_mask, sparse_orthogonal
from prunecli.recipe.recipe import Recipe
from prunecli.run.folder import RunFolder
from toys.jobs import JOB, call, sentence

SHAPES = [(8, 8, 2), (8, 16, 4), (4, 16, 4), (16, 16, 2), (6, 12, 6), (12, 12, 3)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("rows", "columns", "degree"), SHAPES)
def test_the_graph_is_regular_on_both_sides(rows: int, columns: int, degree: int) -> None:
    mask = regular_mask(rows, columns, degree, generator()).tolist()
    assert [sum(row) for row in mask] == [degree] * rows
    assert [sum(row[at] for row in mask) for at in range(columns)] == [rows * degree // columns] * columns
    supports = {tuple(row) for row in mask}
    assert len(supports) == columns // degree
    assert mask != regular_mask(rows, columns, degree, generator(1)).tolist()


@pytest.mark.parametrize(("rows", "columns", "degree"), [(8, 4, 2), (8, 8, 3), (2, 16, 4), (6, 8, 2)])
def test_a_degree_without_a_regular_graph_is_refused(rows: int, columns: int, degree: int) -> None:
    with pytest.raises(ValueError, match="no regular mask"):
        regular_mask(rows, columns, degree, generator())


@pytest.mark.parametrize(("rows", "columns", "degree"), SHAPES)
def test_rows_are_orthonormal_in_single_precision(rows: int, columns: int, degree: int) -> None:
    matrix = sparse_orthogonal(rows, columns, degree, generator()).float()
    for i in range(rows):
        for j in range(rows):
            inner = sum(a * b for a, b in zip(matrix[i].tolist(), matrix[j].tolist(), strict=True))
            assert inner == pytest.approx(float(i == j), abs=1e-5)
    assert [int((row != 0).sum()) for row in matrix] == [degree] * rows


def test_mirrored_by_hand() -> None:
    assert mirrored(torch.tensor([[1.0, 2.0]])).tolist() == [[1, 2, -1, -2], [-1, -2, 1, 2]]


def test_a_relu_between_mirrored_layers_loses_nothing() -> None:
    """[relu(h); relu(-h)] through two layers is [relu(Nh); relu(-Nh)] of the product N = M2 M1, an isometry."""
    first, second = (sparse_orthogonal(8, 8, 2, generator(seed)) for seed in (0, 1))
    h = torch.randn(8, dtype=torch.float64)
    x = torch.cat([h, -h]).relu()
    for matrix in (first, second):
        x = (mirrored(matrix) @ x).relu()
    expected = second @ first @ h
    torch.testing.assert_close(x, torch.cat([expected, -expected]).relu())
    assert float(x.norm()) == pytest.approx(float(h.norm()))


# ------------------------------------------------------------------------------------------------- nets


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, groups=16),
        nn.Conv2d(32, 64, 1, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def started(model: nn.Module, pattern: Pattern = "relu", **how: Any) -> Initialised:
    return initialise_sao_(model, **({"sparsity": None, "degree": None} | how), pattern=pattern, seed=0)


def test_what_each_layer_starts_with() -> None:
    model = net()
    grouped = model[5].weight.clone()
    found = started(model, sparsity=0.5)
    assert found.sparse == {"3": 0.5, "6": 0.5}
    assert (found.dense, found.left) == (("0", "9"), ("5",))
    assert found.residual < 1e-5
    assert torch.equal(model[5].weight, grouped)
    for layer in (model[0], model[3]):
        around = layer.weight.detach().clone()
        around[:, :, 1, 1] = 0
        assert not around.any()
        assert not layer.bias.any()
    M = model[3].weight[:8, :8, 1, 1]
    torch.testing.assert_close(M @ M.T, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(model[3].weight[:, :, 1, 1], mirrored(M))
    N = model[6].weight[:32, :16, 0, 0]  # twice as many outputs as inputs: transposed
    torch.testing.assert_close(N.T @ N, torch.eye(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(model[6].weight[:, :, 0, 0], mirrored(N))
    first, last = model[0].weight[:, :, 1, 1], model[9].weight
    torch.testing.assert_close(first.T @ first, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(last @ last.T, torch.eye(10), atol=1e-5, rtol=0)


def test_a_deep_sparse_linear_net_is_an_isometry() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(12)))
    assert len(started(model, "tanh", degree=2).sparse) == 10
    singular = torch.linalg.svdvals(torch.linalg.multi_dot([layer.weight.detach() for layer in model]))
    assert singular.tolist() == pytest.approx([1.0] * 16, abs=1e-5)


@pytest.mark.parametrize(("pattern", "most", "least"), [("tanh", 0.875, 2), ("relu", 0.75, 4)])
def test_the_largest_sparsity_of_16_channels(pattern: Pattern, most: float, least: int) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    assert started(model, pattern, sparsity=most).sparse == {"1": most}
    before = [layer.weight.clone() for layer in model]
    with pytest.raises(UsageError, match=rf"Layer 1 .* needs {least} connections .* at most a sparsity of {most} "):
        started(model, pattern, sparsity=most + 0.01)
    assert all(torch.equal(layer.weight, old) for layer, old in zip(model, before, strict=True))


@pytest.mark.parametrize(
    ("into", "out", "pattern", "degree", "sparsity"),
    [
        (12, 12, "tanh", 5, 0.5),  # 5 does not divide 12, 6 does
        (22, 11, "tanh", 2, 1 - 2 / 22),
        (22, 11, "relu", 4, None),  # an odd width has no mirrored half
        (22, 11, "tanh", 3, None),  # from 3 on only all 22
    ],
)
def test_widths_without_the_asked_graph_get_the_next_denser_one(
    into: int, out: int, pattern: Pattern, degree: int, sparsity: float | None
) -> None:
    model = nn.Sequential(nn.Linear(3, into), nn.Linear(into, out), nn.Linear(out, 3))
    found = started(model, pattern, degree=degree)
    assert found.sparse == ({} if sparsity is None else {"1": pytest.approx(sparsity)})
    assert ("1" in found.dense) == (sparsity is None)
    assert found.residual < 1e-5


# ------------------------------------------------------------------------------------------------- recipe and job


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "init sao trains from scratch, so it needs pretrained: false"),
        ({"pretrained": False, "method": "tpp"}, "init sao would forget what method tpp trains"),
        ({"pretrained": False, "finetune": {"epochs": 0}}, "init sao is the start of a training"),
        ({"pretrained": False, "init": {"sparsity": 0.5, "degree": 4}}, "sparsity and degree both say how sparse"),
        ({"init": None, "sao": {"degree": 4}}, "sao.degree is now init.degree"),
    ],
)
def test_wrong_combinations_are_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.from_mapping({"init": "sao"} | values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "init sao starts anew after the cut, so there is nothing to recover. Give --recover none."),
        (["--recover=none", "init.degree=1"], "and 1 were asked for."),
        (["--recover=none", "data.name=null"], "init sao is the start of a training, so it needs data. Give --data."),
    ],
)
def test_a_job_that_cannot_start_so_says_it_before_any_work(options: list[str], message: str, tmp_path: Path) -> None:
    job = [part for part in JOB if not part.startswith("--data=") or "data.name=null" not in options]
    job = [part for part in job if not part.startswith("--epochs") or "data.name=null" not in options]
    done = call("compress", *job, "init=sao", *options, f"--out={tmp_path / 'run'}")
    assert done.exit_code == 2
    assert sentence(done).endswith(message)
    assert not (tmp_path / "run").exists()


def test_auto_mirrors_under_relu_only() -> None:
    recipe = Recipe.from_mapping({"init": {"kind": "sao", "sparsity": 0.8}, "pretrained": False})
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    assert (
        "1 of 3 layers start sparse and orthogonal (for tanh), 75.0%"
        in initialise_(smooth, recipe.init, (3, 1, 1), seed=0).rule
    )
    smooth[2] = smooth[4] = nn.ReLU()
    with pytest.raises(UsageError, match="under relu"):
        initialise_(smooth, recipe.init, (3, 1, 1), seed=0)


def test_a_pruned_structure_is_trained_from_a_sparse_start(tmp_path: Path) -> None:
    """LeNet-5 at half width: conv3 has 8 inputs and 60 outputs, 4 and 30 once halved; the others' halves do not fit."""
    job = [part for part in JOB if not part.startswith("--epochs")]
    done = call("compress", *job, "--epochs=1", "--recover=none", "init=sao", f"--out={tmp_path / 'run'}")
    assert done.exit_code == 0, done.stderr
    report = RunFolder(path=tmp_path / "run").report()
    (row,) = report.recovery
    assert row.name == "init sao"
    assert row.rule == (
        "1 of 5 layers start sparse and orthogonal (for relu), 50.0% of their channel pairs unconnected until training "
        "connects them; dense and orthogonal: conv1, conv2, fc1 (+1 more)"
    )
    assert row.residual is not None
    assert row.residual < 1e-5
    assert [stage.name for stage in report.stages] == ["dense", "pruned", "recovered", "finetuned"]
    assert report.verify is not None
    assert report.verify.ok


def test_fine_tuning_alone_starts_so_too(tmp_path: Path) -> None:
    job = [part for part in JOB if not part.startswith(("--epochs", "--target"))]
    done = call("finetune", *job, "--epochs=1", "init=sao", f"--out={tmp_path / 'run'}")
    assert done.exit_code == 0, done.stderr
    report = RunFolder(path=tmp_path / "run").report()
    assert [row.name for row in report.recovery] == ["init sao"]
    assert [stage.name for stage in report.stages] == ["dense", "finetuned"]
