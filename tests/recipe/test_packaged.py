"""Packaged recipes are found, valid and described."""

from __future__ import annotations

import pytest

from prunecli.errors import UsageError
from prunecli.recipe import packaged


def test_every_packaged_recipe_is_valid_and_says_what_it_is_for():
    names = packaged.names()
    assert {"quickstart", "cifar10_resnet56", "papers/resnet56_l1_conv1"} <= set(names)
    for name in names:
        assert packaged.validate(name).model
        assert packaged.summary(name)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UsageError, match="'quickstart'"):
        packaged.read("quickstrat")


def test_a_file_of_the_users_own_wins(tmp_path):
    (tmp_path / "job.yaml").write_text("model: resnet18\n")
    assert packaged.read(str(tmp_path / "job.yaml")) == {"model": "resnet18"}
    with pytest.raises(UsageError, match=r"missing\.yaml"):
        packaged.read(str(tmp_path / "missing.yaml"))
