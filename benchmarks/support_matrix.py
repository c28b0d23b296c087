"""The support matrix: every structure that timm's architectures have, tried on its smallest member.

    python benchmarks/support_matrix.py --work DIR --jobs 2

Every registered architecture is built without weights and grouped by its structure (see `prunecli.trial`); the smallest
of each group is then tried in a process of its own: dependency graph, cuts by ``ratio=0.5`` and ``macs=50%``, each
proved equal to the silenced dense net in float64, forward and backward, export, reload in a fresh process. Finished
rows are kept in DIR, so an interrupted run goes on where it was. At the end ``prunecli/support_matrix.json`` and
``docs/models.md`` are written. Random weights, seed 0, CPU.
"""

from __future__ import annotations

import argparse
import datetime as dt
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch

from prunecli import support, trial, zoo
from prunecli.graph import build_graph
from prunecli.plan import ModelRef
from prunecli.summary import versions
from prunecli.support import Matrix, Row

# The proof holds the model three times in float64. What is too large for that is proved with fewer layers, which differ
# from those left out only in their number; its graph is still built, timed and weighed whole.
TOO_LARGE = 450e6
FEWER_LAYERS: dict[str, dict[str, Any]] = {"focalnet": {"depths": [1, 1, 1, 1]}, "": {"depth": 2}}
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
TIMEOUT_S = 1800


def survey(work: Path) -> dict[str, Row]:
    """A blank row for every architecture, kept in ``survey.jsonl``."""
    path = work / "survey.jsonl"
    known = {row.name: row for row in read_rows(path)}
    with path.open("a", encoding="utf-8") as lines:
        for name in timm.list_models():
            if name not in known:
                ref = reference(name)
                size = zoo.input_spec(ref).size
                known[name] = trial.blank_row(name, zoo.build(ref), model_args={}, input_size=size)
                lines.write(known[name].model_dump_json() + "\n")
                lines.flush()
    return known


def reference(name: str) -> ModelRef:
    """An architecture with its own class count."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    return ModelRef(name=name, num_classes=1000 if cfg is None else cfg.num_classes, timm=timm.__version__)


def representatives(known: Mapping[str, Row]) -> dict[str, str]:
    """For every architecture the smallest one of its module, class and structure."""
    smallest: dict[tuple[str, ...], str] = {}
    for row in sorted(known.values(), key=lambda row: (row.params, row.name)):
        smallest.setdefault((row.module, row.model_class, row.structure), row.name)
    return {name: smallest[row.module, row.model_class, row.structure] for name, row in sorted(known.items())}


def one(name: str) -> Row:
    """Try one architecture here; its graph is timed and weighed first, on a model without weights."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ref = reference(name)
    model, size = zoo.build(ref), zoo.input_spec(ref).size
    params = sum(parameter.numel() for parameter in model.parameters())
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    start, before = time.perf_counter(), resident_mib("VmRSS")
    build_graph(model, size)
    graph = {"graph_seconds": time.perf_counter() - start, "graph_mib": resident_mib("VmHWM") - before}
    del model
    fewer = next(args for prefix, args in FEWER_LAYERS.items() if name.startswith(prefix))
    row = trial.try_architecture(name, model_args=fewer if params > TOO_LARGE else {})
    return row.model_copy(update={key: round(value, 2) for key, value in graph.items()})


def resident_mib(field: str) -> float:
    """Resident memory of this process in MiB: ``VmRSS`` now, ``VmHWM`` at its peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def in_own_process(blank: Row) -> Row:
    """One row, whatever happens to its process."""
    command = [sys.executable, __file__, "--one", blank.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return blank.model_copy(update={"problem": f"not finished after {TIMEOUT_S} s"})
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return blank.model_copy(update={"problem": last[0]})
    return Row.model_validate_json(done.stdout.splitlines()[-1])


def read_rows(path: Path) -> list[Row]:
    """The finished rows of an earlier run."""
    if not path.is_file():
        return []
    return [Row.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(work: Path, jobs: int) -> Matrix:
    """Survey, then every missing row; small models first."""
    work.mkdir(parents=True, exist_ok=True)
    known = survey(work)
    covered_by = representatives(known)
    wanted = sorted(set(covered_by.values()), key=lambda name: known[name].params)
    path = work / "rows.jsonl"
    rows = {row.name: row for row in read_rows(path)}
    missing = [known[name] for name in wanted if name not in rows]
    with path.open("a", encoding="utf-8") as lines, ThreadPoolExecutor(jobs) as pool:
        for row in pool.map(in_own_process, missing):
            rows[row.name] = row
            lines.write(row.model_dump_json() + "\n")
            lines.flush()
            print(f"{len(rows)}/{len(wanted)} {row.name}: {row.status} {row.reason}", flush=True)
    return Matrix(
        date=dt.datetime.now(tz=dt.UTC).date().isoformat(),
        command="python benchmarks/support_matrix.py --work DIR",
        versions=versions(),
        rows=tuple(rows[name] for name in sorted(wanted)),
        covered_by=covered_by,
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
        f"{len(matrix.covered_by)} architectures of timm (and prunecli's own) have {len(matrix.rows)} structures that "
        "differ in more than sizes. The smallest member of each was traced, cut by `ratio=0.5` and by `macs=50%`, "
        "proved (pruned net = dense net with those channels silenced, float64, new random parameters), run forward and "
        "backward, exported and reloaded in a fresh process. "
        f"{len(exact)} of {len(matrix.rows)} structures pass all of it and reload to the bit; they stand for "
        f"{sum(members[row.name] for row in exact)} architectures.",
        "",
        "*Covers*: architectures of this structure. *Prunable*: share of the parameters in tensors with a prunable "
        "axis. *Params, MACs*: left at `macs=50%`. *Error*: the larger of the two proofs, relative. "
        "`prunecli models PATTERN` shows the row of any architecture.",
        "",
        "| structure | module | covers | prunable | groups | params | MACs | error | status |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in matrix.rows:
        last = row.trials[-1] if row.trials else support.Trial(target="")
        left = [
            f"{n / full:.1%}" if n and full else "" for n, full in ((last.params, row.params), (last.macs, row.macs))
        ]
        error = "" if row.worst_error is None else f"{row.worst_error:.0e}"
        said = f"{row.status}{': ' if row.reason else ''}{row.reason}".replace("|", "\\|")
        name = row.name + "".join(f" {key}={value}" for key, value in row.model_args.items())
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
    parser.add_argument("--one", metavar="NAME", help="try one architecture and print its row")
    options = parser.parse_args()
    if options.one:
        print(one(options.one).model_dump_json())
        return
    matrix = run(options.work, options.jobs)
    support.STORED.write_text(matrix.model_dump_json(indent=1) + "\n", encoding="utf-8")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(matrix), encoding="utf-8")


if __name__ == "__main__":
    main()
