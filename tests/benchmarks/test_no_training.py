"""The benchmarks of cuts before and after a short training: their images, arms, figures and tables."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.accuracy import no_training, short_training
from benchmarks.shared import subjects
from benchmarks.shared.ledger import Ledger, package_commit
from benchmarks.shared.subjects import ARMS, BEFORE, NETS, Subject, recipe_of
from benchmarks.shared.torch_pruning_cut import CRITERIA, its_cut, loss_gradients, nearest_cut
from prunecli.data.images import open_data
from prunecli.files import read_tensors, write_tensors
from prunecli.measure.cost import measure
from prunecli.models.build import InputSpec
from prunecli.models.load import load_model
from prunecli.recipe.recipe import Recipe

SPEC = InputSpec(size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)
CLASSES = tuple(f"n{at:08}" for at in range(6))
DIGITS = Recipe.from_mapping(
    {
        "model": "lenet5_relu",
        "pretrained": False,
        "data": {"name": "digits", "train_limit": 200, "val_limit": 40},
        "device": "cpu",
    }
)


@pytest.fixture
def asked(tmp_path: Path) -> argparse.Namespace:
    """Options, with photographs of six classes, two of them among the unseen ones."""
    photographs = tmp_path / "photographs"
    for folder, classes, count in (
        ("imagenet1k_samples/val", CLASSES, 1),
        ("imagenette/val", CLASSES[1:3], 3),
        ("imagenette/train", CLASSES[1:3], 3),
    ):
        for name in classes:
            (photographs / folder / name).mkdir(parents=True)
            for at in range(count):
                pixels = np.full((16, 16, 3), 20 * CLASSES.index(name) + at, dtype=np.uint8)
                Image.fromarray(pixels).save(photographs / folder / name / f"{name}_{folder[:9]}_{at}.png")
    parser = argparse.ArgumentParser()
    subjects.add_sources(parser, arms=(), results=tmp_path / "results.json")
    options = ["--photographs", str(photographs), "--work", str(tmp_path / "work"), "--checkpoints", str(tmp_path)]
    return parser.parse_args([*options, "--arm", "new", "prune.criterion=l2 recover.steps=[bn]"])


# ---------------------------------------------------------------------------------------------- images and nets


def test_photographs_are_judged_on_other_classes_than_they_calibrate_from_with_the_labels_of_the_net(
    asked: argparse.Namespace,
) -> None:
    for _ in range(2):  # the links are there already the second time
        found = subjects.subject("tf_efficientnet_lite0", asked)
    images = open_data(found.recipe.data, SPEC, num_classes=6, seed=0)
    assert torch.cat([y for _, y in images.val_loader()]).tolist() == [0, 2, 4]
    shown, labels = images.calibration(10)
    assert sorted(labels.tolist()) == [1, 3, 5]
    assert torch.equal(((shown[:, 0, 0, 0] + 1) * 127.5).round(), 20.0 * labels)
    assert found.unseen is not None
    unseen = open_data(found.unseen, SPEC, num_classes=6, seed=0)
    assert torch.cat([y for _, y in unseen.val_loader()]).tolist() == [1, 1, 1, 2, 2, 2]


def test_the_head_of_the_ten_classes_is_those_rows_of_the_whole(asked: argparse.Namespace, tmp_path: Path) -> None:
    whole = {
        "conv.weight": torch.randn(3, 2),
        "classifier.weight": torch.randn(6, 4),
        "classifier.bias": torch.randn(6),
    }
    write_tensors(tmp_path / "tf_efficientnet_lite0.safetensors", whole)
    asked.work.mkdir()
    found = subjects.ten_classes("tf_efficientnet_lite0", asked)
    assert found.recipe.weights is not None
    head = read_tensors(Path(found.recipe.weights))
    assert torch.equal(head["classifier.weight"], whole["classifier.weight"][1:3])
    assert torch.equal(head["classifier.bias"], whole["classifier.bias"][1:3])
    assert torch.equal(head["conv.weight"], whole["conv.weight"])
    assert open_data(found.recipe.data, SPEC, num_classes=2, seed=0).class_names == CLASSES[1:3]


@pytest.mark.slow
def test_the_nets_that_are_trained_here_can_be_made() -> None:
    for net in NETS:
        if net in subjects.CIFAR and net != "vgg11_bn":
            args = {**subjects.CIFAR[net].args, "num_classes": 10}
            preprocessing = {"input_size": [3, 32, 32]} if subjects.CIFAR[net].base else {}
            model = load_model(net, pretrained=False, model_args=args, preprocessing=preprocessing).model
            assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


# ---------------------------------------------------------------------------------------------- arms


def test_an_arm_changes_what_it_says_before_what_the_script_sets(asked: argparse.Namespace) -> None:
    recipe = recipe_of(DIGITS, "macs=50%", 3, ARMS[BEFORE], no_training.OWN)
    assert (recipe.prune.criterion, recipe.prune.ranking, recipe.recover.steps) == ("l1", "local", ("lstsq", "bn"))
    assert (str(recipe.target), recipe.seed, recipe.finetune.epochs, recipe.data.val_limit) == ("macs=50%", 3, 0, 100)
    assert recipe.data.train_limit == 200
    assert recipe_of(DIGITS, "macs=50%", 0, ("data.val_limit=7",), no_training.OWN).data.val_limit == 7
    assert subjects.own_arms(asked) == {"new": ("prune.criterion=l2", "recover.steps=[bn]")}


def test_the_best_of_the_peer_is_all_of_its_criteria_with_one_split(asked: argparse.Namespace) -> None:
    asked.arms = ["before", "tp-best"]
    arms = no_training.arms_of(asked)
    assert {"before", "tp", "tp-l2", "tp-taylor", "new"} < arms.keys()
    assert (arms["before"], arms["tp"]) == (ARMS[BEFORE], ())
    assert [no_training.seeds_of(arm, (4, 5)) for arm in ("tp", "tp-taylor", "new")] == [(4,), (4,), (4, 5)]


def test_divergence_is_that_of_the_probabilities() -> None:
    dense, pruned = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    by_hand = (0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)) / 2
    assert no_training.divergence(dense.log() + 3, pruned.log() - 1) == pytest.approx(by_hand)  # logits have no origin
    assert no_training.divergence(dense.log(), dense.log()) == pytest.approx(0)


def test_gradients_are_of_the_sum_over_the_images_and_leave_the_net_alone() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    images, labels = torch.randn(10, 1, 2, 2), torch.arange(10) % 3
    found = loss_gradients(net, images, labels, batch_size=4)
    assert net.training
    assert all(tensor.grad is None for tensor in net.parameters())
    nn.functional.cross_entropy(net.eval()(images), labels, reduction="sum").backward()
    for name, tensor in net.named_parameters():
        assert tensor.grad is not None
        torch.testing.assert_close(found[name], tensor.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("metric", ["macs", "params"])
def test_the_peer_s_cut_comes_near_a_target_and_spares_what_it_is_told_to(metric: Any) -> None:
    dense = load_model("cifar_resnet20", pretrained=False).model
    net, ratio = nearest_cut(dense, (3, 32, 32), 0.5, metric=metric, whole=subjects.PADDED_STREAMS)
    full, left = (getattr(measure(model, (3, 32, 32)), metric) for model in (dense, net))
    assert left / full == pytest.approx(0.5, abs=0.02)
    assert 0.4 < ratio < 0.6
    widths = {name: layer.out_channels for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d)}
    assert {widths[f"layer{stage}.0.conv2"] for stage in (1, 2, 3)} == {16, 32, 64}
    assert widths["conv1"] == 16
    assert all(
        widths[f"layer{stage}.{block}.conv1"] < 16 * 2 ** (stage - 1) for stage in (1, 2, 3) for block in range(3)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_a_criterion_of_the_peer_reads_the_gradients_it_is_given() -> None:
    torch.manual_seed(0)
    dense = load_model("cifar_resnet20", pretrained=False).model
    weight = dense.layer1[0].conv1.weight
    gradients = {name: torch.ones_like(tensor) for name, tensor in dense.named_parameters()}
    gradients["layer1.0.conv1.weight"][::2] = 0  # to Taylor these filters are worth what else reads them alone
    gradients["layer1.0.bn1.weight"][::2] = 0
    gradients["layer1.0.conv2.weight"][:, ::2] = 0
    net = its_cut(dense, (3, 32, 32), 0.5, CRITERIA["taylor"], gradients, subjects.PADDED_STREAMS)
    assert torch.equal(net.layer1[0].conv1.weight, weight[1::2])  # type: ignore[union-attr, index]


# ---------------------------------------------------------------------------------------------- jobs and records


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rows_are_measured_once_and_a_failure_is_a_row_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(no_training, "subject", lambda *_: Subject(recipe=DIGITS))
    arms = {"before": ARMS[BEFORE], "tp-taylor": (), "none": ("prune.select=[nothing]",)}
    asked = argparse.Namespace(nets=["lenet"], targets=["params=50%"], seeds=(0,), device="cpu")
    ledger = Ledger(tmp_path / "results.json")
    no_training.run(asked, arms, ledger)
    first = ledger.records
    assert set(first) == {"lenet/dense", *(f"lenet/params=50%/{arm}/seed=0" for arm in arms)}
    before = first["lenet/params=50%/before/seed=0"]
    assert before["params"] == pytest.approx(0.5, abs=0.01)
    assert before["set"] == list(ARMS[BEFORE])
    assert before["kept"] == ["lstsq", "bn"]
    assert before["kl"] > 0
    assert before["commit"] == package_commit()
    assert first["lenet/params=50%/tp-taylor/seed=0"]["params"] == pytest.approx(0.5, abs=0.03)
    assert "problem" in first["lenet/params=50%/none/seed=0"]
    assert first["lenet/dense"]["kl"] == 0
    monkeypatch.setattr(no_training, "measure", None)
    no_training.run(asked, arms, ledger)
    assert ledger.records == first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_short_training_is_the_job_or_the_same_loop_for_the_peer_s_cut(tmp_path: Path) -> None:
    found = Subject(recipe=DIGITS)
    rows = {
        arm: short_training.measure(found, "macs=50%", 1, arm, 0, ARMS.get(arm, ()))
        for arm in (BEFORE, "tp", "tp-taught")
    }
    for record in rows.values():
        assert record["macs"] == pytest.approx(0.5, abs=0.05)
        assert 0 <= record["top1"] <= 100
        assert record["lr"] > 0
    assert rows[BEFORE]["kept"] == ["lstsq", "bn"]
    assert rows["tp"]["pruned"] == rows["tp-taught"]["pruned"]


def test_the_commit_is_the_package_s_last() -> None:
    commit = package_commit()
    assert commit.rstrip("+").isalnum() or commit == ""


# ---------------------------------------------------------------------------------------------- tables


def shown(text: str) -> list[dict[str, str]]:
    header, _, *rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_the_table_shows_means_over_the_splits_and_the_peer_s_best() -> None:
    some = {"kl": 1.0, "macs": 0.5, "params": 0.47}
    records = {
        "test_vit/dense": {"top1": 60.25},
        "test_vit/macs=50%/tp/seed=0": {**some, "top1": 30.0},
        "test_vit/macs=50%/tp-l2/seed=0": {**some, "top1": 32.0},
        "test_vit/macs=50%/tp-taylor/seed=0": {**some, "top1": 40.0, "kl": 0.5},
        "test_vit/macs=50%/tp-taylor/seed=1": {**some, "top1": 41.0, "kl": 0.7},
        "test_vit/macs=50%/before/seed=0": {**some, "top1": 45.0},
        "test_vit/macs=50%/before/seed=1": {**some, "top1": 46.0, "kl": 2.0},
        "test_vit/params=50%/tp/seed=0": {"problem": "no"},
        "test_vit/params=50%/new/seed=0": {**some, "top1": 50.0, "unseen_top1": 48.0},
    }
    (macs, params) = shown(no_training.table(records, NETS, subjects.TARGETS))
    assert macs == {
        "net (dense)": "test_vit (60.2)",
        "target": "macs=50%",
        "tp": "30.0 / 1; 50% MACs, 47% par.",
        "tp-best": "40.5±0.5 / 0.6; 50% MACs, 47% par. (taylor)",
        "before": "45.5±0.5 / 1.5; 50% MACs, 47% par.",
        "new": "not run",
    }
    assert (params["tp"], params["tp-best"], params["before"]) == ("fails", "not run", "not run")
    assert params["new"] == "50.0 / 1; 48.0; 50% MACs, 47% par."


def test_the_table_of_short_trainings_has_the_noise_of_the_last_epoch() -> None:
    record = {"dense": 60.0, "pruned": 12.0, "params": 0.5, "lr": 0.01, "best": 61.0}
    records = {
        short_training.key("test_vit", "macs=50%", 3, "before", seed): {
            **record,
            "recovered": 40.0,
            "top1": 50.0 + seed,
        }
        for seed in (0, 4)
    }
    records[short_training.key("test_vit", "macs=50%", 1, "tp", 0)] = {**record, "top1": 30.0}
    records[short_training.key("test_vit", "macs=50%", 1, "new", 0)] = {"problem": "no"}
    asked = argparse.Namespace(nets=NETS, targets=subjects.TARGETS, epochs=(1, 3))
    rows = shown(short_training.table(records, asked))
    assert [r["net (dense)"] for r in rows] == ["test_vit (60.00)", "test_vit", "test_vit (60.00)"]
    assert [(r["epochs"], r["arm"], r["seeds"], r["before"], r["last"], r["noise"]) for r in rows] == [
        ("1", "tp", "1", "12.00", "30.00", "-"),
        ("1", "new", "1", "-", "-", "-"),
        ("3", "before", "2", "40.00", "52.00", "2.00"),
    ]
