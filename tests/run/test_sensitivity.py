"""``prunecli sensitivity``: figures that a cut made by hand repeats, kept for the same command and for compress."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from prunecli.graph.build import build_graph
from prunecli.recipe.layers import layered
from prunecli.recipe.recipe import Recipe
from prunecli.run import known_losses, looks
from prunecli.run import sensitivity as job
from prunecli.run.source import load_source, open_calibration, open_images
from prunecli.sensitivity.measured_losses import MeasuredLosses
from prunecli.show.page import sensitivity_page
from prunecli.surgery.cut import cut
from prunecli.values.sensitivity import Sensitivity
from toys.jobs import call, sentence

NET = (
    *("lenet5_relu", "--no-pretrained", "--data=digits", "--device=cpu", "prune.round_to=1"),
    *("data.train_limit=256", "data.val_limit=64", "data.calibration_images=96", "data.held_out_images=32"),
)
QUICK = (*NET, "--recover=none")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A cache in which everything is known, and what the command said; not to be changed."""
    cache = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(known_losses.CACHE, str(cache))
        return cache, sensitivity(*QUICK)


@pytest.fixture
def cache(finished: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that cache, in use."""
    copied = tmp_path / "cache"
    shutil.copytree(finished[0], copied)
    monkeypatch.setenv(known_losses.CACHE, str(copied))
    return copied


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured and not read back: names of units, and ``cut`` for each whole cut."""
    found: list[str] = []
    curve, whole = MeasuredLosses._curve, job._cut_and_measured

    def counted(self, unit):
        found.append(next(iter(unit.order)))
        return curve(self, unit)

    def cut_counted(*arguments):
        found.append("cut")
        return whole(*arguments)

    monkeypatch.setattr(MeasuredLosses, "_curve", counted)
    monkeypatch.setattr(job, "_cut_and_measured", cut_counted)
    return found


def sensitivity(*arguments: str) -> dict:
    done = call("sensitivity", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


RECIPE = {
    "model": "lenet5_relu",
    "pretrained": False,
    "device": "cpu",
    "target": "macs=50%",
    "prune": {"round_to": 1},
    "data": {
        "name": "digits",
        "train_limit": 256,
        "val_limit": 64,
        "calibration_images": 96,
        "held_out_images": 32,
    },
}


def test_a_measured_point_is_the_cut_of_the_plan_that_compress_makes(finished):
    _, found = finished
    recipe = Recipe.from_mapping(RECIPE)
    plan = looks.dry_run(recipe).planned.plan
    source = load_source(recipe)
    calibration = open_calibration(recipe, source, open_images(recipe, source))
    with torch.no_grad():
        dense, pruned = (net(calibration.held_out).double() for net in (source.model, cut(source.model, plan)))
    p = dense.softmax(1)
    kl = float((p * (dense.log_softmax(1) - pruned.log_softmax(1))).sum(1).mean())
    (point,) = [point for point in found["points"] if point["asked"] == 50]
    assert point["measured"]["kl"] == pytest.approx(kl, rel=1e-4)
    assert point["measured"]["recovery"] == "none"
    assert point["cost"] == plan.predicted.model_dump()
    assert point["predicted_kl"] == plan.predicted_kl > 0
    assert found["dense"]["samples"] == point["measured"]["accuracy"]["samples"] == 64


def test_units_have_every_width_and_what_it_saves(finished):
    _, found = finished
    for unit in found["units"]:
        full = str(unit["width"])
        assert unit["curve"][full] == unit["saved"][full] == 0
        assert unit["curve"].keys() == unit["saved"].keys() > unit["kl"].keys()
        saved = [unit["saved"][kept] for kept in sorted(unit["saved"], key=int)]
        assert saved == sorted(saved, reverse=True)
        assert 0 < saved[0] < 100
    asked = [point["asked"] for point in found["points"]]
    assert asked == sorted(asked, reverse=True)
    assert [point["asked"] for point in found["points"] if point["measured"]] == [a for a in asked if a % 10 == 0]
    shares = [100 * point["cost"]["macs"] / found["base"]["macs"] for point in found["points"]]
    assert shares == pytest.approx(asked, rel=0.0101)


def test_the_same_command_measures_nothing_twice(finished, cache, measured, monkeypatch):
    monkeypatch.setattr(job.measure_accuracy, "evaluate", lambda *_, **__: pytest.fail("accuracy was measured again"))
    found = sensitivity(*QUICK)
    assert measured == []
    assert found.pop("folder").startswith(str(cache))
    assert found.items() <= finished[1].items()


def test_people_get_two_tables_and_a_page_with_both_plots(cache, measured):
    done = call("sensitivity", *QUICK, full=True)
    assert measured == []
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    assert any(row[:2] == ["conv1", "6"] for row in rows)
    assert [row[-1] for row in rows if row[:2] == ["100", "%"]] == ["dense"]
    pages = list(cache.rglob("sensitivity.html"))
    assert [page.read_text().count("<svg ") for page in pages] == [2]


def test_without_labels_or_divergences_the_page_has_what_there_is(finished):
    document = {name: value for name, value in finished[1].items() if name != "folder"}
    found = Sensitivity.model_validate(document)
    bare = tuple(
        point.updated(predicted_kl=None, measured=point.measured and point.measured.updated(accuracy=None))
        for point in found.points
    )
    html = sensitivity_page(found.updated(dense=None, points=bare))
    assert html.count("<svg ") == 2
    assert "top-1 (%)" not in html


def test_compress_plans_from_what_is_known_and_plans_the_same(cache, measured, monkeypatch, tmp_path):
    dry = ("compress", *NET, "--target=macs=60%", "--dry-run", "--json")
    done = call("compress", *NET, "--target=macs=60%", "--epochs=0", f"--out={tmp_path / 'run'}", "--json")
    assert measured == []
    report = json.loads(done.stdout)
    monkeypatch.setenv(known_losses.CACHE, "")
    fresh = json.loads(call(*dry).stdout)["plan"]
    assert measured
    assert json.loads((tmp_path / "run/plan.json").read_text()) == fresh
    assert report["sensitivity"]["predicted_kl"] == fresh["predicted_kl"]
    assert report["sensitivity"]["recovered_kl"] > 0


def folder_of(criterion: str = "forward", **changes: object) -> Path:
    recipe = Recipe.from_mapping(layered(RECIPE, changes))
    source = load_source(recipe)
    graph = build_graph(source.model, source.spec.size)
    calibration = open_calibration(recipe, source, open_images(recipe, source))
    return known_losses.known_losses(source, graph, recipe, calibration, criterion=criterion).path


def test_another_model_other_images_and_settings_are_not_known(cache):
    assert folder_of().is_dir()
    others = [
        folder_of(seed=1),
        folder_of(recover={"ridge": 0.1}),
        folder_of(data={"calibration_images": 80}),
        folder_of(data={"held_out_images": 31}),
        folder_of("varw"),
    ]
    assert len({*others, folder_of()}) == 6
    assert folder_of(target="macs=30%", recover={"steps": ["bn"]}) == folder_of()


def test_an_interruption_loses_only_the_unit_at_hand(finished, cache, measured, monkeypatch):
    for file in cache.rglob("curves/*.json"):
        file.unlink()
    counted = MeasuredLosses._curve

    def interrupted(self, unit):
        if len(measured) == 2:
            raise KeyboardInterrupt
        return counted(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(MeasuredLosses, "_curve", interrupted)
        done = call("sensitivity", *QUICK)
    assert done.exit_code == 130
    assert "The same command goes on" in sentence(done)
    found = sensitivity(*QUICK)
    assert found["units"] == finished[1]["units"]
    assert len(measured) == len(set(measured)) == len(found["units"])


def test_damaged_files_are_measured_again_and_said(finished, cache, measured):
    next(cache.rglob("curves/*.json")).write_text('{"losses": {"4": 1.0}, "measured": {}, "divergences": {}}')
    next(cache.rglob("cuts/*.json")).write_text("{")
    next(cache.rglob("scores.safetensors")).write_bytes(b"nothing")
    done = call("sensitivity", *QUICK, "--json")
    assert json.loads(done.stdout)["units"] == finished[1]["units"]
    assert done.stderr.count("measured again") == 3
    assert len(measured) == 2
    assert "cut" in measured


def test_without_a_cache_only_time_is_lost(monkeypatch, tmp_path):
    monkeypatch.setenv(known_losses.CACHE, "/dev/null/cache")
    done = call("sensitivity", *QUICK, f"--out={tmp_path / 'report'}", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("folder") == str(tmp_path / "report")
    assert json.loads((tmp_path / "report/sensitivity.json").read_text()) == found
    assert "lenet5_relu" in (tmp_path / "report/sensitivity.html").read_text()


def test_costs_out_of_reach_are_left_out_with_a_note(cache):
    found = sensitivity(*QUICK, "prune.max_ratio=0.3")
    assert min(point["asked"] for point in found["points"]) > 30
    assert any("Nothing below" in note for note in found["notes"])


def test_images_are_needed():
    done = call("sensitivity", "lenet5_relu", "--no-pretrained")
    assert done.exit_code == 2
    assert "measured on images" in sentence(done)
