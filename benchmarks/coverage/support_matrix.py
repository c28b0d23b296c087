"""The support matrix: every structure that timm's architectures have, tried on its smallest member.

    python benchmarks/coverage/support_matrix.py --work DIR --jobs 2

Every registered architecture is built without weights and grouped by its structure (see `trial`); the smallest
of each group is then tried: dependency graph, cuts by ``ratio=0.5`` and ``macs=50%``, each
proved equal to the silenced dense net in float64, forward and backward, export, reload in a fresh process. Finished
rows are kept in DIR, so an interrupted run goes on where it was. Then the graph of every architecture is built, whole.
At the end ``prunecli/support_matrix.json`` and ``docs/models.md`` are written. Random weights, seed 0, CPU.
"""

from __future__ import annotations

import argparse
import datetime as dt
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch

if not __package__:  # run as a program, from any folder
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from benchmarks.coverage import trial
from prunecli.errors import PruneError
from prunecli.graph.build import build_graph
from prunecli.models.build import build, input_spec
from prunecli.planning.inspect import prunable_share
from prunecli.run.summary import versions
from prunecli.values import support_matrix
from prunecli.values.plan import ModelRef
from prunecli.values.support_matrix import Matrix, Row, Traced
from prunecli.values.value import Value

# The proof runs the net five times in float64. What is too large for that here is proved with fewer layers of the same
# structure; its graph is still built, timed and weighed whole. Where that cannot be, images shrink above HUGE_MACS.
MANY_PARAMETERS, MANY_MACS, HUGE_MACS = 150e6, 15e9, 200e9
FEWER_LAYERS: tuple[dict[str, Any], ...] = ({"depth": 2}, {"depths": [2, 2, 2, 2]}, {"layers": [2, 2, 2, 2]})
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
BATCH = 8  # architectures a process
NEW_CLASSES = 10
V = TypeVar("V", bound=Value)


def survey(work: Path) -> dict[str, Row]:
    """A blank row for every architecture, kept in ``survey.jsonl``."""
    path = work / "survey.jsonl"
    known = {row.name: row for row in read_values(Row, path)}
    with path.open("a", encoding="utf-8") as lines:
        for name in timm.list_models():
            if name not in known:
                ref = reference(name)
                size = input_spec(ref).size
                known[name] = trial.blank_row(name, build(ref), model_args=ref.args, input_size=size)
                lines.write(known[name].model_dump_json() + "\n")
                lines.flush()
    return known


def reference(name: str) -> ModelRef:
    """An architecture with its own class count; one that comes without a classifier gets one, where it can."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    classes = 1000 if cfg is None or cfg.num_classes is None else cfg.num_classes
    args = {} if classes else {"num_classes": NEW_CLASSES}
    return ModelRef(name=name, args=args, num_classes=classes or NEW_CLASSES, timm=timm.__version__)


def representatives(known: Mapping[str, Row]) -> dict[str, str]:
    """For every architecture the smallest one of its module, class and structure."""
    smallest: dict[tuple[str, ...], str] = {}
    for row in sorted(known.values(), key=lambda row: (row.params, row.name)):
        smallest.setdefault((row.module, row.model_class, row.structure), row.name)
    return {name: smallest[row.module, row.model_class, row.structure] for name, row in sorted(known.items())}


def one(name: str, out: Path) -> Row:
    """Try one architecture here; its graph is timed and weighed first, on a model without weights."""
    ref = reference(name)
    model, size = build(ref), input_spec(ref).size
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    start, before = time.perf_counter(), resident_mib("VmRSS")
    graph = build_graph(model, size)
    effort = {"graph_seconds": time.perf_counter() - start, "graph_mib": resident_mib("VmHWM") - before}
    large = graph.numel({}, graph.tensors) > MANY_PARAMETERS or graph.macs({}) > MANY_MACS
    fewer = fewer_layers(ref, trial.structure_digest(model)) if large else {}
    smaller = None if fewer or graph.macs({}) <= HUGE_MACS else smaller_images(size, graph.macs({}))
    del model
    row = trial.try_architecture(name, model_args={**ref.args, **fewer}, input_size=smaller, out=out)
    return row.model_copy(update={key: round(value, 2) for key, value in effort.items()})


def fewer_layers(ref: ModelRef, structure: str) -> dict[str, Any]:
    """Arguments that build the same structure with fewer layers; none where no known argument does."""
    for args in FEWER_LAYERS:
        try:
            smaller = build(ref.model_copy(update={"args": {**ref.args, **args}}))
        except (PruneError, RuntimeError, IndexError):
            continue
        if trial.structure_digest(smaller) == structure:
            return args
    return {}


def smaller_images(size: tuple[int, int, int], macs: float) -> tuple[int, int, int]:
    """Half the height and width, as often as it takes to come below HUGE_MACS (convolutions: a quarter each time)."""
    channels, height, width = size
    return size if macs <= HUGE_MACS else smaller_images((channels, height // 2, width // 2), macs / 4)


def resident_mib(field: str) -> float:
    """Resident memory of this process in MiB: ``VmRSS`` now, ``VmHWM`` at its peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def trace_all(work: Path, names: Iterable[str]) -> list[Traced]:
    """The graph of every architecture, whole and without weights, kept in ``graphs.jsonl``."""
    path = work / "graphs.jsonl"
    known = {found.name: found for found in read_values(Traced, path)}
    with path.open("a", encoding="utf-8") as lines:
        for name in names:
            if name not in known:
                known[name] = trace_one(name)
                lines.write(known[name].model_dump_json() + "\n")
                lines.flush()
    return [known[name] for name in names]


def trace_one(name: str) -> Traced:
    """Time, groups and prunable share of one architecture."""
    ref = reference(name)
    model, size = build(ref), input_spec(ref).size
    params = sum(parameter.numel() for parameter in model.parameters())
    start = time.perf_counter()
    try:
        graph = build_graph(model, size)
    except PruneError as error:
        return Traced(name=name, params=params, problem=str(error))
    return Traced(
        name=name,
        params=params,
        groups=len(graph.groups),
        prunable_share=prunable_share(model, graph),
        seconds=round(time.perf_counter() - start, 2),
    )


def several(names: Sequence[str], place: Path) -> None:
    """Try architectures one after the other, a row a line; what raises anything but a refusal is a row as well."""
    for name in names:
        (place / name).mkdir()
        try:
            row = one(name, place / name)
        except Exception as error:
            row = refused(name, f"{type(error).__name__}: {error}")
        print(row.model_dump_json(), flush=True)


def refused(name: str, problem: str) -> Row:
    """A row that says only why there is none."""
    ref = reference(name)
    blank = trial.blank_row(name, build(ref), model_args=ref.args, input_size=input_spec(ref).size)
    return blank.model_copy(update={"problem": problem})


def in_fresh_processes(names: Sequence[str]) -> list[Row]:
    """Rows of some architectures: tried in one process, reloaded in another, whatever happens to either."""
    with tempfile.TemporaryDirectory() as place:
        rows = {row.name: row for row in map(Row.model_validate_json, child("--several", place, *names))}
        differences = dict(line.split() for line in child("--reload", place, *rows))
    done = [
        row.model_copy(update={"reload_max_abs_diff": None if found == "None" else float(found)})
        for name, row in rows.items()
        for found in [differences.get(name, "None")]
    ]
    if len(done) < len(names):  # the next one ended the process
        done += [refused(names[len(done)], "its process ended"), *in_fresh_processes(names[len(done) + 1 :])]
    return done


def child(*arguments: str) -> list[str]:
    """What this script prints with these arguments, line by line, in a process of its own."""
    if len(arguments) < 3:
        return []
    command = [sys.executable, __file__, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        return [line for line in process.stdout if line.strip()]


def read_values(kind: type[V], path: Path) -> list[V]:
    """What an earlier run finished."""
    if not path.is_file():
        return []
    return [kind.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(work: Path, jobs: int, *, all_rows: bool) -> Matrix:
    """Survey, then every missing row: first the smallest of every class, small models before large ones."""
    work.mkdir(parents=True, exist_ok=True)
    known = survey(work)
    covered_by = representatives(known)
    wanted = in_order([known[name] for name in set(covered_by.values())])
    path = work / "rows.jsonl"
    rows = {row.name: row for row in read_values(Row, path)}
    missing = [name for name in wanted if name not in rows] if all_rows else []
    batches = [missing[at : at + BATCH] for at in range(0, len(missing), BATCH)]
    with path.open("a", encoding="utf-8") as lines, ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(in_fresh_processes, batch) for batch in batches]):
            for row in done.result():
                rows[row.name] = row
                lines.write(row.model_dump_json() + "\n")
                lines.flush()
                print(f"{len(rows)}/{len(wanted)} {row.name}: {row.status} {row.reason}", flush=True)
    return Matrix(
        date=dt.datetime.now(tz=dt.UTC).date().isoformat(),
        command="python benchmarks/coverage/support_matrix.py --work DIR",
        versions=versions(),
        rows=tuple(rows[name] for name in sorted(wanted) if name in rows),
        covered_by={name: by for name, by in covered_by.items() if by in rows},
        untried=tuple(name for name, by in covered_by.items() if by not in rows),
        graphs=tuple(trace_all(work, list(covered_by)) if all_rows else read_values(Traced, work / "graphs.jsonl")),
    )


def in_order(rows: Sequence[Row]) -> list[str]:
    """Names, the smallest of every class first, then by size."""
    seen: set[tuple[str, str]] = set()
    later = []
    for row in sorted(rows, key=lambda row: (row.params, row.name)):
        key = (row.module, row.model_class)
        later.append((key in seen, row.params, row.name))
        seen.add(key)
    return [name for *_, name in sorted(later)]


def graphs_line(graphs: Sequence[Traced]) -> str:
    """What building the graph of every architecture took, and found."""
    built = [found for found in graphs if found.problem is None]
    if not built:
        return "The graphs of the other architectures were not built."
    slowest = max(built, key=lambda found: found.seconds)
    least = min(built, key=lambda found: found.prunable_share)
    below = sum(found.prunable_share < 0.9 for found in built)
    return (
        f"Graphs were built of {len(built)} of {len(graphs)} architectures, whole and without weights, on one thread: "
        f"median {statistics.median(found.seconds for found in built):.2f} s, at most {slowest.seconds:.1f} s "
        f"({slowest.name}). Less than 90 % of the parameters are prunable in {below} of them, least in {least.name} "
        f"({least.prunable_share:.1%})."
    )


def page(matrix: Matrix) -> str:
    """The matrix as a document: totals, then a line a row."""
    members = Counter(matrix.covered_by.values())
    exact = [row for row in matrix.rows if row.status == "exact"]
    packages = ", ".join(f"{name} {number}" for name, number in matrix.versions.items())
    lines = [
        "# Supported models",
        "",
        f"Written by `{matrix.command}` on {matrix.date} with {packages}.",
        "",
        f"{len(matrix.covered_by)} architectures of timm and prunecli's own have {len(matrix.rows)} structures that "
        "differ in more than sizes. The smallest member of each was traced, cut by `ratio=0.5` and by `macs=50%`, "
        "proved (pruned net = dense net with those channels silenced, float64, new random parameters), run forward and "
        "backward, exported and reloaded in a fresh process. "
        f"{len(exact)} of {len(matrix.rows)} structures pass all of it and reload to the bit; they stand for "
        f"{sum(members[row.name] for row in exact)} architectures."
        + (f" The structures of {len(matrix.untried)} other architectures were not tried." if matrix.untried else ""),
        "",
        graphs_line(matrix.graphs),
        "",
        "*Covers*: architectures of this structure. *Prunable*: share of the parameters in tensors with a prunable "
        "axis. *Params, MACs*: left at `macs=50%`. *Error*: the larger of the two proofs, relative. "
        "`prunecli models PATTERN` shows the row of any architecture.",
        "",
        "| structure | module | covers | prunable | groups | params | MACs | error | status |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in matrix.rows:
        last = row.trials[-1] if row.trials else support_matrix.Trial(target="")
        left = [
            f"{n / full:.1%}" if n and full else "" for n, full in ((last.params, row.params), (last.macs, row.macs))
        ]
        error = "" if row.worst_error is None else f"{row.worst_error:.0e}"
        said = f"{row.status}{': ' if row.reason else ''}{row.reason}".replace("|", "\\|")
        name = row.name + "".join(f" {key}={value}" for key, value in row.model_args.items())
        if row.input_size != input_spec(reference(row.name)).size:
            name += f" at {row.input_size[1]}x{row.input_size[2]} px"
        cells = [
            name,
            row.module,
            str(members[row.name]),
            f"{row.prunable_share:.1%}",
            str(row.groups),
            *left,
            error,
            said,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where finished rows are kept")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--finished", action="store_true", help="try no more, write what is finished")
    parser.add_argument("--graphs", action="store_true", help="build the graphs of all architectures, and stop there")
    parser.add_argument("--several", nargs="+", metavar=("DIR", "NAME"), help="try architectures, export to DIR/NAME")
    parser.add_argument(
        "--reload", nargs="+", metavar=("DIR", "NAME"), help="load what was exported, print differences"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.graphs:
        trace_all(options.work, timm.list_models())
        return
    if options.several:
        several(options.several[1:], Path(options.several[0]))
        return
    if options.reload:
        for name in options.reload[1:]:
            print(name, trial.reload_difference(Path(options.reload[0]) / name), flush=True)
        return
    matrix = run(options.work, options.jobs, all_rows=not options.finished)
    Path(str(support_matrix.STORED)).write_text(matrix.model_dump_json(indent=1) + "\n", encoding="utf-8")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(matrix), encoding="utf-8")


if __name__ == "__main__":
    main()
