"""The stages of a job, each a function from value to value: load, plan, prove, cut. ``pipeline`` composes them.

Nothing here writes a file or knows of a run folder.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from prunecli.data.images import Images, open_data
from prunecli.errors import NothingPrunedError, PruneError, UnsupportedError, UsageError
from prunecli.graph.build import build_graph
from prunecli.measure import jacobian
from prunecli.measure.cost import measure
from prunecli.models.build import InputSpec, input_spec
from prunecli.models.load import load_model
from prunecli.models.user_function import Function
from prunecli.planning import budget, score
from prunecli.planning.score import Scores
from prunecli.proof import equivalence
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.settings import PruneSettings
from prunecli.recipe.target import Target
from prunecli.run.folder import RunFolder, is_run, load_exported
from prunecli.surgery.cut import cut_
from prunecli.values.groups import Graph
from prunecli.values.plan import Cost, ModelRef, Plan, PlannedGroup
from prunecli.values.report import TargetResult

EQUIVALENCE_TOLERANCE: Final = 1e-9
_DEVICES: Final = ("cpu", "cuda")
_MOST_SPARED: Final = 4  # times that a group is left whole for the proof's sake; a model that needs more is unsupported
# Exact Jacobians cost K backward passes an image, a Lanczos step two; `auto` takes as many images as this many
# multiply-adds buy (about a minute on two CPU cores), and Lanczos where they buy no exact one.
_JACOBIAN_MACS: Final = {"cpu": 1.5e12, "cuda": 1.5e14}
_JACOBIAN_IMAGES: Final = {"exact": 16, "lanczos": 8}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A loaded model: the module (CPU, eval), where it comes from, and what it costs."""

    model: nn.Module
    ref: ModelRef
    spec: InputSpec
    digest: str
    cost: Cost
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan with what the solver said about it."""

    plan: Plan
    target: TargetResult
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Proven:
    """A plan that was shown to be right, and the graph it was made with: groups that were not right are frozen."""

    planned: Planned
    proof: equivalence.Equivalence
    graph: Graph


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What ``prunecli inspect`` says of a model.

    Attributes:
        model: where it comes from.
        input_size: channels, height, width.
        cost: of the dense model.
        graph: coupled groups and what stays whole; without the groups that could not be cut on trial.
        prunable_share: share of the parameters in tensors with a prunable axis, 0 to 1.
        supported: whether half of every group could be cut correctly.
        status: the same as a sentence.
    """

    model: ModelRef
    input_size: tuple[int, int, int]
    cost: Cost
    graph: Graph
    prunable_share: float
    supported: bool
    status: str

    def to_mapping(self) -> dict[str, Any]:
        """A JSON document: costs, groups with their layers, frozen axes with their reasons."""
        return {
            "model": self.model.name,
            "input_size": list(self.input_size),
            "engine": self.graph.engine,
            "cost": self.cost.model_dump(),
            "prunable_share": self.prunable_share,
            "supported": self.supported,
            "status": self.status,
            "groups": [
                {
                    "name": group.name,
                    "kind": group.kind,
                    "width": group.width,
                    "writes": list(group.layers("out")),
                    "reads": list(group.layers("in")),
                    "norms": list(group.norms),
                }
                for group in self.graph.groups
            ],
            "frozen": [asdict(axis) for axis in self.graph.frozen],
            "ties": [list(tie.groups) for tie in self.graph.ties],
            "exclusive": [list(names) for names in self.graph.exclusive],
            "unknown_ops": dict(self.graph.unknown_ops),
        }


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` → a device that exists. Raises UsageError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"Unknown device {name!r}.", hint="Known: auto, cpu, cuda, cuda:N.") from None
    if device.type not in _DEVICES:
        raise UsageError(f"Unknown device {name!r}.", hint="Known: auto, cpu, cuda, cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"Device {name} was asked for, but {torch.cuda.device_count()} CUDA devices are visible.")
    return device


def run_of(recipe: Recipe) -> RunFolder | None:
    """The run folder whose model a recipe starts from; none where it names a model of another kind."""
    if recipe.model is None:
        return None
    folder = RunFolder(path=Path(recipe.model.removeprefix("local-dir:")))
    return folder if is_run(folder.path) or folder.begun else None


def load_source(recipe: Recipe) -> Source:
    """Load the model that a recipe names: a timm name, a hub or local folder, a function, or a run folder.

    Raises UsageError (no such model) or PruneError (broken weights).
    """
    if recipe.model is None:
        raise UsageError(
            "No model was given.", hint="Name a timm model, hf-hub:…, local-dir:…, package.module:function or a run."
        )
    if run := run_of(recipe):
        path = run.path
        function = Function(name=recipe.function, args=recipe.model_args) if recipe.function else None
        if recipe.weights or recipe.data.preprocessing or (recipe.model_args and not function):
            raise UsageError(f"{path} is a run folder: it brings its own weights, arguments and preprocessing.")
        model, exported = load_exported(path, function)
        ref, digest = exported.model, exported.weights_sha256
        notes: tuple[str, ...] = (f"The base is the pruned model of {path}.",)
    elif recipe.function:
        raise UsageError(
            f"{recipe.model} is no run folder, so {recipe.function!r} cannot have made it.", hint="Name one."
        )
    else:
        loaded = load_model(
            recipe.model,
            weights=recipe.weights,
            pretrained=recipe.pretrained,
            model_args=recipe.model_args,
            preprocessing=recipe.data.preprocessing,
            seed=recipe.seed,
        )
        model, ref, digest, notes = loaded.model, loaded.ref, loaded.digest, loaded.notes
    broken = [name for name, tensor in model.named_parameters() if not bool(tensor.isfinite().all())]
    broken += [name for name, tensor in model.named_buffers() if bool(tensor.isnan().any())]  # a mask may be infinite
    if broken:
        raise PruneError(f"The weights of {recipe.weights or recipe.model} are not finite, first in {broken[0]}.")
    spec = input_spec(ref)
    return Source(model=model, ref=ref, spec=spec, digest=digest, cost=measure(model, spec.size), notes=tuple(notes))


def open_images(recipe: Recipe, source: Source) -> Images | None:
    """The data of a recipe, or None where it names none. Raises UsageError, PruneError."""
    if recipe.data.name is None:
        return None
    if source.ref.num_classes == 0:
        raise UsageError(
            f"Model {recipe.model!r} has no classifier, so data cannot say how good it is.",
            hint="Give --model-arg num_classes=N to put a new one on it, or no --data.",
        )
    return open_data(recipe.data, source.spec, num_classes=source.ref.num_classes, seed=recipe.seed)


def make_plan(
    source: Source, graph: Graph, scores: Scores, target: Target | budget.Learned, settings: PruneSettings
) -> Planned:
    """Choose the channels that stay and predict the costs. Scores nothing, trains nothing, changes nothing.

    Args:
        source: the dense model.
        graph: its coupled groups.
        scores: importance of the channels, of these groups or of more.
        target: what to reach, or the widths that were learnt.
        settings: ranking, patterns, rounding, limits.

    Raises:
        TargetError: out of reach, with the reachable range.
        NothingPrunedError: nothing would be removed.
    """
    names = [name for name, _ in source.model.named_parameters()]
    stored = list(source.model.state_dict())
    values = scores.channels
    choice = budget.choose(graph, values, target, settings, parameters=names, stored=stored, base=source.cost)
    kept = {name: len(keep) for name, keep in choice.keep.items()}
    groups = tuple(
        PlannedGroup(
            name=group.name,
            kind=group.kind,
            width=group.width,
            keep=choice.keep.get(group.name, tuple(range(group.width))),
            score=tuple(values[group.name].tolist()) if group.name in values else None,
            members=group.members,
            norms=group.norms,
        )
        for group in graph.groups
    )
    plan = Plan(
        model=source.ref,
        engine=graph.engine,
        criterion=scores.criterion,
        ranking=settings.ranking if isinstance(target, Target) else "learned",
        seed=scores.seed,
        groups=groups,
        attributes=graph.solve(kept),
        folds=tuple(fold for fold in graph.folds if kept.get(fold.group, 0)),
        base=source.cost,
        predicted=choice.cost,
    )
    result = TargetResult(
        metric=target.metric if isinstance(target, Target) else "ratio",
        asked=choice.asked,
        reached=choice.reached,
        reachable=choice.reachable,
    )
    return Planned(plan=plan, target=result, notes=choice.notes)


def inspection(source: Source, recipe: Recipe) -> Inspection:
    """The dependency graph of a model, and whether half of every group can be cut correctly.

    Raises UnsupportedError only where there is no graph at all.
    """
    graph = build_graph(source.model, source.spec.size, engine=recipe.prune.graph)
    supported, status = True, "half of every group was cut on trial: the net equals the silenced dense net"
    try:
        scores = score.score_model(source.model, graph.groups, criterion="l1", seed=recipe.seed)
        proven = proven_plan(source, graph, scores, Target(metric="ratio", value=0.5), recipe.prune)
        graph = proven.graph
        status += f" to {proven.proof.relative_error:.1e}"
    except (UnsupportedError, NothingPrunedError) as error:
        supported, status = False, error.message
    return Inspection(
        model=source.ref,
        input_size=source.spec.size,
        cost=source.cost,
        graph=graph,
        prunable_share=prunable_share(source.model, graph),
        supported=supported,
        status=status,
    )


def prunable_share(model: nn.Module, graph: Graph) -> float:
    """The share of a model's parameters that lie in tensors with a prunable axis."""
    prunable = {member.tensor for group in graph.groups for member in group.members}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(size for name, size in sizes.items() if name in prunable) / max(sum(sizes.values()), 1)


def proven_plan(
    source: Source, graph: Graph, scores: Scores, target: Target | budget.Learned, settings: PruneSettings
) -> Proven:
    """Plan a cut and show that it is right, before any work is spent on it.

    A group that cannot be cut correctly, though the graph says so, is looked for by halving; it stays whole, and all is
    planned again from the same scores. The arguments are those of ``make_plan``.

    Raises:
        UnsupportedError: the cut net does not equal the dense net with those channels silenced, whatever stays whole.
        PruneError: as ``make_plan``.
    """
    notes: tuple[str, ...] = ()
    seed = scores.seed
    while True:
        planned = make_plan(source, graph, scores, target, settings)
        proof = _proof(source, graph, planned.plan, _kept(planned.plan), seed=seed)
        if proof.relative_error <= EQUIVALENCE_TOLERANCE:
            return Proven(planned=replace(planned, notes=(*notes, *planned.notes)), proof=proof, graph=graph)
        refusal = _refusal(planned.plan, proof)
        if len(notes) == _MOST_SPARED:
            raise refusal
        names = proof.unseen or _culprits(source, graph, planned.plan, seed=seed)
        problem = proof.reason or f"the outputs differ by {proof.relative_error:.2g}"
        graph = graph.without(names, f"a cut of it was tried and is not right: {problem}")
        notes = (*notes, f"{', '.join(names)}: all channels stay, a cut was tried and is not right ({problem})")
        if not graph.groups:
            raise refusal


def _kept(plan: Plan) -> dict[str, int]:
    return {group.name: len(group.keep) for group in plan.cut_groups}


def _culprits(source: Source, graph: Graph, plan: Plan, *, seed: int) -> tuple[str, ...]:
    """Groups that are cut together, with which a cut that is right becomes one that is not."""
    kept = _kept(plan)
    units = [tuple(name for name in tie.groups if name in kept) for tie in graph.all_ties()]
    units = [unit for unit in units if unit]
    good, bad = 0, len(units)
    while bad - good > 1:
        middle = (good + bad) // 2
        some = {name: kept[name] for unit in units[:middle] for name in unit}
        right = _proof(source, graph, plan, some, seed=seed).relative_error <= EQUIVALENCE_TOLERANCE
        good, bad = (middle, bad) if right else (good, middle)
    return units[bad - 1]


def _proof(source: Source, graph: Graph, plan: Plan, kept: Mapping[str, int], *, seed: int) -> equivalence.Equivalence:
    """Try a plan where only the groups of ``kept`` are cut."""
    whole = {group.name: tuple(range(group.width)) for group in plan.groups if group.name not in kept}
    return equivalence.equivalence_error(
        source.model,
        groups=tuple(g.model_copy(update={"keep": whole.get(g.name, g.keep)}) for g in plan.groups),
        attributes=graph.solve(kept),
        folds=plan.folds,
        input_size=source.spec.size,
        seed=seed,
    )


def _refusal(plan: Plan, proof: equivalence.Equivalence) -> UnsupportedError:
    return UnsupportedError(
        f"{plan.model.name} cannot be pruned correctly: the pruned net differs from the dense net with those "
        f"channels silenced by {proof.relative_error:.2g} (relative, float64; limit {EQUIVALENCE_TOLERANCE:g}). "
        f"{proof.reason}".rstrip(),
        hint="Exclude the layers with prune.exclude, and please report the model.",
    )


def cut(model: nn.Module, plan: Plan) -> nn.Module:
    """A smaller copy of ``model``, by the plan. Raises UnsupportedError where a tensor does not fit it."""
    smaller = copy.deepcopy(model)
    cut_(smaller, groups=plan.groups, attributes=plan.attributes, folds=plan.folds)
    return smaller


def jacobian_effort(recipe: Recipe, source: Source, device: torch.device) -> tuple[Literal["exact", "lanczos"], int]:
    """How the Jacobian spectrum is taken, and over how many images; none where even one would take too long."""
    settings, passes = recipe.spectrum, {"exact": 3 * source.ref.num_classes, "lanczos": 2 * recipe.spectrum.steps}
    bought = {how: int(_JACOBIAN_MACS[device.type] / (n * source.cost.macs or 1)) for how, n in passes.items()}
    wanted = 1 if settings.samples == "auto" else settings.samples
    how = settings.method
    if how == "auto":
        how = "exact" if bought["exact"] >= wanted else "lanczos"
    if settings.samples != "auto":
        return how, settings.samples
    return how, min(_JACOBIAN_IMAGES[how], bought[how]) if source.ref.num_classes else 0


def jacobian_spectrum(
    recipe: Recipe, source: Source, model: nn.Module, images: Images | None, device: torch.device
) -> jacobian.JacobianSpectrum | None:
    """The Jacobian spectrum of ``model``, a stage of ``source``; None where it is off or would take too long."""
    how, count = jacobian_effort(recipe, source, device)
    if count == 0:
        return None
    batch = spectrum_batch(images, source.spec, count, seed=recipe.seed).to(device)
    settings = recipe.spectrum
    if how == "exact":
        return jacobian.jacobian_spectrum(model.to(device), batch, chunk=settings.chunk)
    return jacobian.jacobian_estimate(model.to(device), batch, steps=settings.steps, seed=recipe.seed)


def spectrum_batch(images: Images | None, spec: InputSpec, count: int, *, seed: int) -> Tensor:
    """Images [count, C, H, W] for the Jacobian: training images in evaluation preprocessing, else Gaussian noise."""
    if images is not None:
        return images.calibration(count)[0]
    return torch.randn(count, *spec.size, generator=torch.Generator().manual_seed(seed))
