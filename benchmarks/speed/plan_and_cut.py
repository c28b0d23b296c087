"""Plan + cut: our graph, scores, solver and surgery against Torch-Pruning's own pruner, same process, interleaved.

    python benchmarks/speed/plan_and_cut.py --repeats 3 --json plan_and_cut.json [MODEL ...]

Without names: the smallest architecture of every module of timm in the support matrix, each in a process of its own,
where the two sides take turns. Both remove half of every prunable width by L1 from the same freshly built model (random
weights, seed 0, CPU). Timed is everything between "a model in memory" and "a smaller model in memory"; building the
model is not. Printed are medians with their spread, and the median ratio of the pairs. Torch-Pruning runs with its own
recipe for timm models: classifier ignored, attention registered through ``num_heads``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import torch_pruning as tp
from torch import nn

if not __package__:  # run as a program, from any folder
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from benchmarks.shared.own_process import in_own_process
from prunecli.graph.build import build_graph
from prunecli.models.build import input_spec
from prunecli.planning import budget, score
from prunecli.recipe.settings import PruneSettings
from prunecli.recipe.target import Target
from prunecli.surgery.cut import cut_
from prunecli.values import support_matrix
from prunecli.values.plan import Cost, ModelRef, PlannedGroup

CLASSES = 10
TIMEOUT_S = 180  # for all pairs of one model


def ours(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """Graph, scores, plan, cut."""
    graph = build_graph(model, size)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    scores = score.score_groups(graph.groups, tensors, criterion="l1")
    settings = PruneSettings(round_to=1).decided(by_data=False)
    names = [name for name, _ in model.named_parameters()]
    base = Cost(params=graph.numel({}, names), macs=graph.macs({}), bytes=4 * graph.numel({}, model.state_dict()))
    choice = budget.choose(
        graph, scores, Target.parse("ratio=0.5"), settings, parameters=names, stored=list(model.state_dict()), base=base
    )
    groups = [
        PlannedGroup(name=g.name, kind=g.kind, width=g.width, keep=choice.keep[g.name], members=g.members)
        for g in graph.groups
        if g.name in choice.keep
    ]
    kept = {group.name: len(group.keep) for group in groups}
    cut_(model, groups=groups, attributes=graph.solve(kept), folds=graph.folds)
    return model


def theirs(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """Torch-Pruning's group pruner."""
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    pruner = tp.pruner.MetaPruner(
        model,
        torch.randn(1, *size),
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[classifier] if isinstance(classifier, nn.Module) else [],
        num_heads=dict(heads),
        prune_num_heads=bool(heads),
        in_channel_groups={},
        out_channel_groups={},
        root_module_types=[nn.Conv2d, nn.Linear],
    )
    pruner.step()
    return model


@dataclass(frozen=True)
class Timing:
    """One side of a pair: seconds, the parameters left, and why the smaller model does not run (None: it runs)."""

    seconds: float
    params: int
    failure: str | None


def timed(run: Callable[[nn.Module, tuple[int, int, int]], nn.Module], name: str) -> Timing:
    """Time one plan and cut of a fresh model, then try the result."""
    torch.manual_seed(0)
    ref = ModelRef(name=name, num_classes=CLASSES, timm=timm.__version__)
    model, size = timm.create_model(name, num_classes=CLASSES).eval(), input_spec(ref).size
    began = time.perf_counter()
    failure = None
    try:
        model = run(model, size)
    except Exception as error:  # whatever a peer raises is its answer
        failure = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - began
    if failure is None:
        try:
            with torch.no_grad():
                model(torch.randn(2, *size))
        except (RuntimeError, AssertionError, ValueError) as error:
            failure = f"its cut does not run: {error}"
    params = sum(parameter.numel() for parameter in model.parameters())
    return Timing(seconds, params, failure.splitlines()[0][:100] if failure else None)


def summary(timings: list[Timing]) -> dict[str, Any]:
    """Median and spread of one side."""
    seconds = [timing.seconds for timing in timings]
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "params": timings[-1].params,
        "failure": timings[-1].failure,
    }


def pairs(name: str, repeats: int) -> dict[str, Any]:
    """Both sides in turn, ``repeats`` times after a pair that warms up imports and allocators."""
    measured = []
    for repeat in range(repeats + 1):
        pair = (timed(ours, name), timed(theirs, name))
        if repeat:
            measured.append(pair)
        if pair[1].failure and repeat:
            break  # nothing to compare with
    return {
        "ours": summary([pair[0] for pair in measured]),
        "theirs": summary([pair[1] for pair in measured]),
        "ratio": statistics.median(a.seconds / b.seconds for a, b in measured),
    }


def handled(row: dict[str, Any]) -> bool:
    """Whether both sides made a smaller net that runs."""
    return "problem" not in row and not row["ours"]["failure"] and not row["theirs"]["failure"]


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if "problem" in row:
        return f"| {row['model']} | {row['problem']} | | | | |"
    cells = [row["model"]]
    for side in (row["ours"], row["theirs"]):
        seconds = f"{side['median']:.2f} [{side['min']:.2f}–{side['max']:.2f}]"  # noqa: RUF001 - a range
        cells += [seconds, side["failure"] or f"{side['params']:,}"]
    cells.append(f"{row['ratio']:.2f}" if handled(row) else "")
    return f"| {' | '.join(cells)} |"


def totals(rows: list[dict[str, Any]]) -> str:
    """The median ratio, and the ratio of the sums, over the models that both handle."""
    both = [row for row in rows if handled(row)]
    if not both:
        return "No model is handled by both."
    mine, peer = (sum(row[side]["median"] for row in both) for side in ("ours", "theirs"))
    ratio = statistics.median(row["ratio"] for row in both)
    return (
        f"{len(both)} of {len(rows)} models are handled by both: median ratio {ratio:.2f}, "
        f"in total {mine:.1f} s against {peer:.1f} s, {mine / peer:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", metavar="NAME", help="time one model and print JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        print(json.dumps(pairs(options.one, options.repeats)))
        return
    rows = []
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "torch-pruning"))
    print(f"{packages}; {options.repeats} pairs, {torch.get_num_threads()} threads\n")
    print("| model | ours, s | parameters left | theirs, s | parameters left | ratio |")
    print("|---|---|---|---|---|---|")
    for name in options.models or [row.name for row in support_matrix.stored_matrix().smallest_of_modules()]:
        arguments = ("--one", name, "--repeats", str(options.repeats))
        rows.append({"model": name, **in_own_process(__file__, *arguments, timeout_s=TIMEOUT_S)})
        print(line(rows[-1]), flush=True)
    print(f"\n{totals(rows)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
