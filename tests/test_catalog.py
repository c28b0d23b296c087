"""Packaged recipes are found, valid and described."""

from __future__ import annotations

import pytest

from prunecli import catalog
from prunecli.errors import UsageError


def test_every_packaged_recipe_is_valid_and_says_what_it_is_for():
    names = catalog.names()
    assert {"quickstart", "cifar10_resnet56", "papers/resnet56_l1_conv1"} <= set(names)
    for name in names:
        assert catalog.validate(name).model
        assert catalog.summary(name)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UsageError, match="'quickstart'"):
        catalog.read("quickstrat")


def test_a_file_of_the_users_own_wins(tmp_path):
    (tmp_path / "job.yaml").write_text("model: resnet18\n")
    assert catalog.read(str(tmp_path / "job.yaml")) == {"model": "resnet18"}
    with pytest.raises(UsageError, match=r"missing\.yaml"):
        catalog.read(str(tmp_path / "missing.yaml"))
