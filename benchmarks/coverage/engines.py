"""Axis inference and Torch-Pruning's graph on the same models: which coupled groups differ, and which side is right.

    python benchmarks/coverage/engines.py --jobs 2 --json engines.json [MODEL ...]

Without names: the smallest architecture of every module of timm in the support matrix. Each model is built once with
random weights (seed 0, CPU) in a process of its own. A group is compared by the places it takes up: the tensors and
dimensions of its members. For each engine half of every width is then cut and compared with the silenced dense net in
float64, the same check ``compress`` makes: who is wrong shows there.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a program, from any folder
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from benchmarks.shared.own_process import in_own_process
from prunecli.errors import PruneError
from prunecli.graph.build import ENGINES, build_graph
from prunecli.models.source import Source
from prunecli.planning.inspect import prunable_share
from prunecli.planning.prove import proven_plan
from prunecli.recipe.recipe import Recipe
from prunecli.run.scores import scores_of
from prunecli.run.source import load_source
from prunecli.values import support_matrix
from prunecli.values.groups import Graph

TIMEOUT_S = 300


def places(graph: Graph) -> dict[tuple[int, frozenset[tuple[str, int]]], str]:
    """What each group couples: its width, and the tensors and dimensions it runs through."""
    return {(g.width, frozenset((m.tensor, m.dim) for m in g.members)): g.name for g in graph.groups}


def verdict(source: Source, recipe: Recipe, graph: Graph) -> str:
    """The error of half of every group cut, with the groups that had to stay whole for it; or why there is none."""
    try:
        assert recipe.target is not None
        scores = scores_of(source, graph, recipe, None)
        proven = proven_plan(source, graph, scores, recipe.target, recipe.prune)
    except PruneError as error:
        return str(error)
    return "; ".join([f"{proven.proof.relative_error:.0e}", *proven.planned.notes])


def compare(name: str) -> dict[str, Any]:
    """Both graphs of one model, their differences and their proofs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    settings = {"model": name, "pretrained": False, "target": "ratio=0.5", "prune": {"round_to": 1}}
    recipe = Recipe.from_mapping(settings)
    source = load_source(recipe)
    found: dict[str, Any] = {"name": name}
    coupled = {}
    for engine in ENGINES:
        try:
            graph = build_graph(source.model, source.spec.size, engine=engine)
        except PruneError as error:
            found[engine] = {"groups": 0, "share": 0.0, "proof": str(error)}
            continue
        coupled[engine] = places(graph)
        found[engine] = {
            "groups": len(graph.groups),
            "share": round(prunable_share(source.model, graph), 4),
            "proof": verdict(source, recipe, graph),
        }
    if len(coupled) == len(ENGINES):
        axes, other = (coupled[engine] for engine in ENGINES)
        found["same"] = len(axes.keys() & other.keys())
        found["only_axes"] = sorted(name for key, name in axes.items() if key not in other)
        found["only_torch_pruning"] = sorted(name for key, name in other.items() if key not in axes)
    return found


def compared(name: str) -> dict[str, Any]:
    return in_own_process(__file__, "--one", name, timeout_s=TIMEOUT_S)


def line(row: dict[str, Any]) -> str:
    if "problem" in row:
        return f"| {row['name']} | {row['problem']} |"
    cells = [row["name"]]
    for engine in ENGINES:
        side = row[engine]
        cells += [str(side["groups"]), f"{side['share']:.1%}", side["proof"][:120]]
    cells += [str(row.get("same", "-")), *(str(len(row.get(f"only_{engine}", []))) for engine in ENGINES)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", metavar="NAME", help="compare one model and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compare(options.one)))
        return
    names = options.models or [row.name for row in support_matrix.stored_matrix().smallest_of_modules()]
    rows = []
    print("| model | groups | prunable | proof | groups (TP) | prunable | proof | same | only axes | only TP |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, found in zip(names, pool.map(compared, names), strict=True):
            row = {"name": name, **found}
            rows.append(row)
            print(line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
