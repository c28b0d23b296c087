"""The support matrix as a value: status, reasons, names, and the file that is shipped."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import timm

import prunecli.models.paper_nets  # noqa: F401 (registers the papers' networks)
from prunecli.errors import UsageError
from prunecli.values.support_matrix import Matrix, stored_matrix
from toys.sample_matrix import matrix, row, trials

OURS = ("timm.", "prunecli.")


def test_exact_is_every_cut_proved_and_a_reload_to_the_bit():
    assert row("a", "m").status == "exact"
    assert row("a", "m", reload_max_abs_diff=1e-9).status == "refused"
    assert row("a", "m", reload_max_abs_diff=None).status == "refused"
    assert row("a", "m", trials=()).status == "refused"
    assert row("a", "m", trials=(trials()[0], trials(problem="no")[1])).status == "refused"


def test_the_reason_is_the_first_problem_else_what_stays():
    assert row("a", "m").reason == ""
    assert row("a", "m", problem="too odd", trials=()).reason == "too odd"
    assert row("a", "m", reload_max_abs_diff=1e-9).reason == "reloads with a difference of 1.0e-09"
    assert row("a", "m", reload_max_abs_diff=None).reason == "it could not be reloaded"
    spared = trials()[0].model_copy(update={"notes": ("stem: all channels stay",)})
    assert row("a", "m", trials=(spared, trials()[1])).reason == "stem: all channels stay"
    gmlp = matrix().row("gmlp_b16_224")
    assert gmlp.reason == "19.7% stay: it is a spatial axis (image or feature-map positions)"


def test_names_by_pattern_or_part():
    assert list(matrix().matching("resnet")) == ["resnet18", "resnet34"]
    assert list(matrix().matching("*18")) == ["resnet18"]
    assert matrix().matching("resnet34")["resnet34"].name == "resnet18"
    with pytest.raises(UsageError, match="No architecture matches 'resnett'"):
        matrix().matching("resnett")
    with pytest.raises(UsageError, match="No structure of 'eva' was tried"):
        matrix().model_copy(update={"untried": ("eva_giant",)}).matching("eva")


def test_it_is_a_json_value():
    assert Matrix.model_validate_json(matrix().model_dump_json()) == matrix()


def test_the_shipped_matrix_knows_every_architecture_of_its_timm():
    shipped = stored_matrix()
    names = {row.name for row in shipped.rows}
    assert set(shipped.covered_by.values()) == names
    assert all(shipped.covered_by[name] == name for name in names)
    if shipped.versions["timm"] != version("timm"):
        pytest.skip(f"it was measured with timm {shipped.versions['timm']}")
    # Other test modules register nets of their own with timm.
    known = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith(OURS)}
    assert known == {*shipped.covered_by, *shipped.untried}


def test_whoever_is_below_ninety_per_cent_says_why():
    for tried in stored_matrix().rows:
        if tried.status != "exact" or tried.prunable_share < 0.9:
            assert tried.reason, tried.name
