"""Whole jobs on real timm architectures, random weights: planned, proved, cut, exported and reloaded by a job."""

from __future__ import annotations

import json

import pytest
import torch

import prunecli
from prunecli.errors import UsageError
from prunecli.models.load import load_model
from prunecli.models.outputs import tensors_of
from prunecli.recipe.recipe import Recipe
from prunecli.run import pipeline
from prunecli.run.export import reference_input

ARCHITECTURES = {
    "resnet18": {},
    "resnet50": {},
    "resnext50_32x4d": {},
    "regnety_002": {},
    "mobilenetv3_small_100": {},
    "efficientnet_b0": {},
    "convnext_atto": {},
    "densenet121": {},
    "vit_tiny_patch16_224": {"round_to": 1},
    "deit_tiny_patch16_224": {"round_to": 1, "attention": "head_dim"},
    "swin_tiny_patch4_window7_224": {"round_to": 1},
    "cifar_resnet56": {"round_to": 1},
    "cifar_vgg19": {},
}


FEATURES = {
    "resnet18": {"features_only": True},
    "convnext_atto": {"features_only": True, "out_indices": [1, 2]},
    "vit_tiny_patch16_224": {"num_classes": 0},
    "swin_tiny_patch4_window7_224": {"features_only": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_feature_extractors_keep_their_widths_and_reload(name, tmp_path):
    recipe = Recipe.from_mapping(
        {"model": name, "model_args": FEATURES[name], "pretrained": False, "target": "macs=60%", "device": "cpu"}
    )
    report = pipeline.compress(recipe, out=tmp_path / "run")
    assert report.final["macs"] == pytest.approx(0.6 * report.base["macs"], rel=0.01)
    assert report.verify is not None
    assert report.verify.reload_max_abs_diff == 0
    assert any("no classifier" in warning for warning in report.warnings)
    images = reference_input((3, 224, 224))
    plain = load_model(name, pretrained=False, model_args=FEATURES[name]).model
    with torch.no_grad():
        widths = [[t.shape for t in tensors_of(m(images))] for m in (plain, prunecli.load(tmp_path / "run"))]
    assert widths[0] == widths[1]


def test_data_cannot_judge_a_feature_extractor(tmp_path):
    settings = {"model": "resnet18", "model_args": {"features_only": True}, "pretrained": False, "target": "macs=60%"}
    with pytest.raises(UsageError, match="no classifier") as error:
        pipeline.compress(Recipe.from_mapping(settings | {"data": {"name": "digits"}}), out=tmp_path / "run")
    assert "num_classes=N" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_half_the_multiply_adds_leave_and_the_rest_reloads(name, tmp_path):
    recipe = Recipe.from_mapping(
        {
            "model": name,
            "pretrained": False,
            "target": "macs=50%",
            "prune": ARCHITECTURES[name],
            "spectrum": {"samples": 0},
            "device": "cpu",
        }
    )
    report = pipeline.compress(recipe, out=tmp_path / "run")
    assert report.final["macs"] == pytest.approx(0.5 * report.base["macs"], rel=0.01)
    assert report.verify is not None
    assert report.verify.ok
    assert report.verify.reload_max_abs_diff == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["prunecli"]["structure"]["tensors"]

    # What users of timm's feature extraction rely on follows the cut: the recorded widths are those that come out.
    model = prunecli.load(tmp_path / "run")
    images = reference_input(tuple(config["pretrained_cfg"]["input_size"]))
    with torch.no_grad():
        features = model.forward_features(images)
    assert model.num_features in features.shape
    assert model.get_classifier().in_features == model.head_hidden_size
