"""What only the proof finds is left whole, said, and does not keep the rest of a model from being pruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunecli.errors import UnsupportedError
from prunecli.graph.build import build_graph
from prunecli.planning import score
from prunecli.planning.prove import Proven, proven_plan
from prunecli.proof.equivalence import equivalence_error
from prunecli.recipe.recipe import Recipe
from prunecli.run import plan_and_prove
from prunecli.run.scores import scores_of
from toys.sources import source_of

SIZE = (3, 4, 4)


class Sly(nn.Module):
    """Some layers take another path for a width of 9: neither the dense width of 12 nor half of it shows that."""

    def __init__(self, sly: tuple[int, ...], layers: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(12 if i else 3, 12, 1) for i in range(layers))
        self.sly, self.head = frozenset(map(str, sly)), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = x.sin() if f"{i}" in self.sly and f"{x.shape[1]}" == "9" else x.tanh()
        return self.head(x.mean((2, 3)))


def proven(model: nn.Module, **target: Any) -> Proven:
    torch.manual_seed(0)
    source = source_of(model, SIZE)
    prune = {"round_to": 1, "criterion": "l1", "ranking": "local"}
    recipe = Recipe.from_mapping({"model": "sly", "target": "ratio=0.25", "prune": prune} | target)
    graph = build_graph(model, SIZE)
    assert recipe.target is not None
    return proven_plan(source, graph, scores_of(source, graph, recipe, None), recipe.target, recipe.prune)


def test_the_group_behind_a_wrong_cut_is_found_left_whole_and_said() -> None:
    model = Sly((2,))
    result = proven(model)
    assert result.proof.relative_error < 1e-12
    assert [group.name for group in result.graph.groups] == ["convs.0", "convs.1", "convs.3"]
    assert [group.name for group in result.planned.plan.cut_groups] == ["convs.0", "convs.1", "convs.3"]
    (reason,) = (axis.reason for axis in result.graph.frozen if axis.name == "convs.2")
    assert reason.startswith("a cut of it was tried and is not right: the outputs differ by ")
    assert result.planned.notes[0].startswith("convs.2: all channels stay")


def test_several_are_found_one_after_the_other() -> None:
    result = proven(Sly((0, 3)))
    assert [group.name for group in result.graph.groups] == ["convs.1", "convs.2"]
    assert len(result.planned.notes) == 2


def test_sparing_a_group_scores_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    l1, scored = score.CRITERIA["l1"], list[str]()

    def counted(evidence: Any) -> Tensor | None:
        scored.append(evidence.group.name)
        return l1(evidence)

    monkeypatch.setitem(score.CRITERIA, "l1", counted)
    recipe = Recipe.from_mapping({"model": "sly", "target": "ratio=0.25", "prune": {"round_to": 1, "criterion": "l1"}})
    planned, _ = plan_and_prove.plan_and_prove(source_of(Sly((0, 3)), SIZE), recipe, None)
    assert len(planned.notes) == 2
    assert scored == ["convs.0", "convs.1", "convs.2", "convs.3"]


def test_a_model_of_many_mistakes_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="cannot be pruned correctly"):
        proven(Sly((0, 1, 2, 3, 4, 5), layers=7))


def test_a_model_with_nothing_left_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="cannot be pruned correctly"):
        proven(Sly((0, 1), layers=2))


def test_what_was_planned_is_what_was_proved() -> None:
    model = Sly((2,))
    plan = proven(model).planned.plan
    outcome = equivalence_error(
        model, groups=plan.groups, attributes=plan.attributes, folds=plan.folds, input_size=SIZE, seed=7
    )
    assert outcome.relative_error < 1e-12
