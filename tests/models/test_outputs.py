"""Logits, wherever a model puts them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from prunecli.errors import UnsupportedError
from prunecli.models.outputs import logits_of, tensors_of

LOGITS, OTHER = torch.zeros(2, 3), torch.ones(2, 5)
Named = namedtuple("Named", ["aux", "logits"])  # as torchvision's InceptionOutputs
Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        {"hidden": OTHER, "logits": LOGITS},
        {"aux": OTHER, "out": LOGITS},
        {"out": OTHER, "logits": LOGITS},
        OrderedDict(loss=OTHER.sum(), logits=LOGITS),
        (LOGITS, OTHER),
        [LOGITS],
        Named(OTHER, LOGITS),
        Pair(LOGITS, OTHER),
        Output(OTHER, LOGITS),
        ({"out": LOGITS}, OTHER),
    ],
)
def test_the_logits_are_found(output: Any) -> None:
    assert logits_of(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ({"prediction": LOGITS}, "returns dict"),
        ((), "returns tuple"),
        (([],), "returns tuple"),
        (None, "returns NoneType"),
        ({"logits": None}, "returns dict"),
        (Output, "returns type"),
        (torch.zeros(2, 3, 4, 4), r"returns shape \(2, 3, 4, 4\)"),
        ((torch.zeros(3), LOGITS), r"returns shape \(3,\)"),
    ],
)
def test_other_outputs_are_refused_with_what_they_are(output: Any, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        logits_of(output)


def test_all_tensors_of_an_output_in_order() -> None:
    nested = {"a": LOGITS, "b": [OTHER, (LOGITS, None)], "c": Output(OTHER, LOGITS), "d": 3, "e": Pair(OTHER, "x")}
    found = tensors_of(nested)
    assert [id(t) for t in found] == [id(t) for t in (LOGITS, OTHER, LOGITS, OTHER, LOGITS, OTHER)]
