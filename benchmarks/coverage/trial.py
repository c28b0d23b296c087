"""One architecture tried from end to end: graph, cuts, proofs, export, reload. A row of the support matrix."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import timm
from torch import nn
from torch.nn.modules.conv import _ConvNd

from prunecli.errors import PruneError
from prunecli.graph.build import build_graph
from prunecli.models.source import Source
from prunecli.planning.inspect import prunable_share
from prunecli.planning.prove import proven_plan
from prunecli.planning.score import score_model
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.target import Target
from prunecli.run import verify
from prunecli.run.export import export
from prunecli.run.folder import RunFolder
from prunecli.run.source import load_source
from prunecli.surgery.cut import cut
from prunecli.values.groups import Frozen, Graph
from prunecli.values.plan import Plan
from prunecli.values.support_matrix import FrozenShare, Row, Trial

TARGETS: Final = ("ratio=0.5", "macs=50%")
_WORTH_SAYING: Final = 0.001  # share of the parameters below which a reason to freeze is left out


def blank_row(name: str, model: nn.Module, *, model_args: Mapping[str, Any], input_size: tuple[int, int, int]) -> Row:
    """What is known of a model before anything is tried."""
    home = timm.models.model_entrypoint(name).__module__
    return Row(
        name=name,
        model_args=dict(model_args),
        module=home.removeprefix("timm.models.").partition(".")[0],
        model_class=type(model).__name__,
        structure=structure_digest(model),
        input_size=input_size,
        params=sum(parameter.numel() for parameter in model.parameters()),
    )


def structure_digest(model: nn.Module) -> str:
    """A digest of the kinds of modules a model is made of, sizes and repetitions left out.

    A kind is a class with its parameters' names and ranks, its switches (bools, None), the kinds of convolution, and
    the classes of its children; numbers in names are left out.
    """
    kinds = set()
    for module in model.modules():
        parameters = sorted((name, p.dim()) for name, p in module.named_parameters(recurse=False))
        switches = sorted(
            (name, value)
            for name, value in vars(module).items()
            if (value is None or isinstance(value, bool)) and name != "training" and not name.startswith("_")
        )
        children = sorted({(re.sub(r"\d+", "*", name), type(kid).__name__) for name, kid in module.named_children()})
        kinds.add(repr((type(module).__name__, parameters, switches, children, _convolution_kind(module))))
    return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:12]


def _convolution_kind(module: nn.Module) -> str:
    if not isinstance(module, _ConvNd) or module.groups == 1:
        return ""
    return "depthwise" if module.groups == module.in_channels else "grouped"


def try_architecture(
    name: str,
    *,
    model_args: Mapping[str, Any] | None = None,
    input_size: tuple[int, int, int] | None = None,
    out: Path,
    seed: int = 0,
) -> Row:
    """Load with random weights, trace, cut by every target of ``TARGETS`` with proof, export the last cut to ``out``.

    Whether it reloads is for `reload_difference` to say, in this process or in a fresh one.

    What prunecli refuses (a `PruneError`) becomes the row's ``problem``; any other exception is a defect and goes up.

    Args:
        name: registered architecture.
        model_args: keyword arguments for ``timm.create_model``.
        input_size: channels, height, width; none: the architecture's own.
        out: an empty folder.
        seed: of weights and images.
    """
    args = dict(model_args or {})
    settings = {"model": name, "pretrained": False, "model_args": args, "seed": seed, "prune": {"round_to": 1}}
    recipe = Recipe.from_mapping({**settings, "data": {"input_size": input_size}})
    source = load_source(recipe)
    row = blank_row(name, source.model, model_args=args, input_size=source.spec.size)
    row = row.model_copy(update={"macs": source.cost.macs})
    try:
        graph = build_graph(source.model, source.spec.size)
    except PruneError as error:
        return row.model_copy(update={"problem": str(error)})
    trials, plans = zip(*(try_cut(source, graph, recipe, target) for target in TARGETS), strict=True)
    if (plan := plans[-1]) is not None:
        small = cut(source.model, plan)
        export(RunFolder(path=out), small, ref=source.ref, base=source.cost, final=plan.predicted)
    return row.model_copy(
        update={
            "groups": len(graph.groups),
            "prunable_share": prunable_share(source.model, graph),
            "frozen": _frozen(source.model, graph),
            "unknown_ops": tuple(sorted(graph.unknown_ops)),
            "trials": trials,
        }
    )


def try_cut(source: Source, graph: Graph, recipe: Recipe, target: str) -> tuple[Trial, Plan | None]:
    """Plan one cut and prove it; no plan where it was refused."""
    settings = recipe.prune.decided(by_data=False)
    try:
        scores = score_model(source.model, graph.groups, criterion=settings.criterion, seed=recipe.seed)
        proven = proven_plan(source, graph, scores, Target.parse(target), settings)
    except PruneError as error:
        return Trial(target=target, problem=str(error)), None
    planned = proven.planned
    size = planned.plan.predicted
    trial = Trial(
        target=target,
        params=size.params,
        macs=size.macs,
        relative_error=proven.proof.relative_error,
        notes=planned.notes,
    )
    return trial, planned.plan


def reload_difference(out: Path) -> float | None:
    """Largest difference of the logits of two fixed images between the exported and the loaded model.

    None where nothing was exported to ``out``.
    """
    return verify.verify_here(out).reload_max_abs_diff if RunFolder(path=out).config_file.is_file() else None


def _frozen(model: nn.Module, graph: Graph) -> tuple[FrozenShare, ...]:
    """Why parameters without a prunable axis have none, by the reason of their widest axis, most parameters first."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    prunable = {member.tensor for group in graph.groups for member in group.members}
    widest: dict[str, Frozen] = {}
    for axis in graph.frozen:
        for name in axis.tensors:
            if name not in widest or axis.width > widest[name].width:
                widest[name] = axis
    reasons: Counter[str] = Counter()
    for name in sizes.keys() - prunable:
        said = widest[name].reason if name in widest else "no operator was seen to use it"
        reasons[_without_place(said)] += sizes[name]
    limit = _WORTH_SAYING * sum(sizes.values())
    return tuple(FrozenShare(reason=reason, params=n) for reason, n in reasons.most_common() if n >= limit)


def _without_place(reason: str) -> str:
    return re.sub(r"module '[^']*'", "a module", reason)
