"""Plan + cut: our graph, scores, solver and surgery against Torch-Pruning's own pruner, same process, interleaved.

    python benchmarks/plan_and_cut.py --repeats 5 --json plan_and_cut.json

Both remove half of every prunable width by L1 from the same freshly built model (random weights, seed 0, CPU). Timed is
everything between "a model in memory" and "a smaller model in memory"; building the model is not. Printed are medians
with their spread, and the ratio of the medians of the pairs. Torch-Pruning runs with its own recipe for timm models:
classifier ignored, attention registered through ``num_heads``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import timm
import torch
import torch_pruning as tp
from torch import nn

from prunecli import budget, score, surgery
from prunecli.graph import build_graph
from prunecli.plan import Cost, PlannedGroup
from prunecli.recipe import PruneSettings, Target

MODELS = (
    "resnet18",
    "resnet50",
    "mobilenetv3_large_100",
    "regnety_002",
    "densenet121",
    "convnext_tiny",
    "vgg11_bn",
    "vit_tiny_patch16_224",
)


def ours(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """Graph, scores, plan, cut."""
    graph = build_graph(model, size)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    scores = score.score_groups(graph.groups, tensors, criterion="l1")
    settings = PruneSettings(round_to=1)
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
    surgery.cut_(model, groups=groups, attributes=graph.solve(kept), folds=graph.folds)
    return model


def theirs(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """Torch-Pruning's group pruner."""
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    pruner = tp.pruner.MetaPruner(
        model,
        torch.randn(1, *size),
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[model.get_classifier()],
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
    model = timm.create_model(name).eval()
    size = model.default_cfg["input_size"]
    began = time.perf_counter()
    smaller = run(model, size)
    seconds = time.perf_counter() - began
    failure = None
    try:
        with torch.no_grad():
            smaller(torch.randn(1, *size))
    except RuntimeError as error:
        failure = str(error).splitlines()[0]
    return Timing(seconds, sum(p.numel() for p in smaller.parameters()), failure)


def summary(timings: list[Timing]) -> dict[str, object]:
    """Median and spread of one side."""
    seconds = [timing.seconds for timing in timings]
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "params": timings[-1].params,
        "failure": timings[-1].failure,
    }


def shown(side: dict[str, object]) -> str:
    """One side of a row of the table."""
    left = "does not run" if side["failure"] else f"{side['params']:,}"
    return f"{side['median']:7.2f} [{side['min']:.2f} to {side['max']:.2f}] {left:>12}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "torch-pruning"))
    print(f"{packages}; {options.repeats} pairs, {torch.get_num_threads()} threads")
    print(f"{'model':26} {'ours: s [spread], params left':>35} {'theirs: likewise':>35}  ratio")
    for name in options.models:
        pairs = []
        for repeat in range(options.repeats + 1):
            pair = (timed(ours, name), timed(theirs, name))
            if repeat:  # the first pair warms up imports and allocators
                pairs.append(pair)
        row = {"model": name, "ours": summary([pair[0] for pair in pairs]), "theirs": summary([p[1] for p in pairs])}
        row["ratio"] = statistics.median(a.seconds / b.seconds for a, b in pairs)
        rows.append(row)
        print(f"{name:26} {shown(row['ours'])} {shown(row['theirs'])} {row['ratio']:6.2f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
