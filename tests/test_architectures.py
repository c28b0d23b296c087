"""Whole jobs on real timm architectures, random weights: planned, proved, cut, exported and reloaded by a job."""

from __future__ import annotations

import json

import pytest
import torch

import prunecli
from prunecli import pipeline
from prunecli.recipe import Recipe
from prunecli.store import reference_input

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
