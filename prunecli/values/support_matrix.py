"""The support matrix: what was tried on timm's architectures, with what result. Values and the stored file.

One *row* is one architecture that was traced, cut, proved, exported and reloaded. Architectures that differ from it
only in sizes share its *structure* and are *covered* by it. ``benchmarks/coverage/support_matrix.py`` writes the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any, Literal

from prunecli.errors import PruneError, UsageError, nearest, one_line
from prunecli.values.value import Value

STORED = files("prunecli") / "support_matrix.json"


class FrozenShare(Value):
    """Parameters in tensors without a prunable axis, and why, the place left out."""

    reason: str
    params: int


class Trial(Value):
    """One cut: what was asked, what is left, and how far the pruned net is from the silenced dense one."""

    target: str
    params: int | None = None
    macs: int | None = None
    relative_error: float | None = None
    notes: tuple[str, ...] = ()
    problem: str | None = None


class Row(Value):
    """One architecture that was tried.

    Attributes:
        name: timm architecture, built with ``model_args``.
        module: module of ``timm.models`` (or ``prunecli``) that defines it.
        model_class: class of the model.
        structure: digest of everything but sizes; equal for architectures that differ only there.
        input_size: channels, height, width.
        prunable_share: share of the parameters that lie in tensors with a prunable axis.
        frozen: what the others are, most first.
        unknown_ops: operators without a rule.
        trials: cuts, each proved.
        reload_max_abs_diff: logits of the exported and reloaded last cut against those before, 0 where bit-equal.
        graph_seconds: dependency graph, one thread.
        graph_mib: memory at its peak over what the model itself took.
        problem: why nothing was tried.
    """

    name: str
    model_args: Mapping[str, Any] = {}
    module: str
    model_class: str
    structure: str
    input_size: tuple[int, int, int]
    params: int
    macs: int = 0
    groups: int = 0
    prunable_share: float = 0.0
    frozen: tuple[FrozenShare, ...] = ()
    unknown_ops: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    reload_max_abs_diff: float | None = None
    graph_seconds: float | None = None
    graph_mib: float | None = None
    problem: str | None = None

    @property
    def status(self) -> Literal["exact", "refused"]:
        """``exact``: every cut was proved, and the last one reloads to the bit."""
        proved = self.trials and all(t.problem is None and t.relative_error is not None for t in self.trials)
        return "exact" if proved and self.reload_max_abs_diff == 0 else "refused"

    @property
    def reason(self) -> str:
        """Why it is refused, what the plan left whole, or what most of its unprunable parameters are; else empty."""
        problems = [self.problem, *(trial.problem for trial in self.trials)]
        said = next((problem for problem in problems if problem), None)
        if said is None and self.reload_max_abs_diff:
            said = f"reloads with a difference of {self.reload_max_abs_diff:.1e}"
        if said is None and self.reload_max_abs_diff is None:
            said = "it could not be reloaded"
        if said is None:
            said = next((note for trial in self.trials for note in trial.notes), None)
        if said is None and self.frozen and self.prunable_share < 0.99:
            said = f"{self.frozen[0].params / self.params:.1%} stay: {self.frozen[0].reason}"
        return said or ""

    @property
    def worst_error(self) -> float | None:
        """The largest relative error of its cuts."""
        return max((t.relative_error for t in self.trials if t.relative_error is not None), default=None)

    def to_mapping(self) -> dict[str, Any]:
        """A JSON document: the stored fields and the status."""
        return self.model_dump(mode="json") | {"status": self.status}


class Traced(Value):
    """One architecture of which the graph alone was built, whole and without weights."""

    name: str
    params: int = 0
    groups: int = 0
    prunable_share: float = 0.0
    seconds: float = 0.0
    problem: str | None = None


class Matrix(Value):
    """Every row, for every architecture the row that stands for its structure, and every architecture's own graph.

    ``untried`` are architectures of whose structure none was tried.
    """

    schema_version: Literal[1] = 1
    date: str
    command: str
    versions: Mapping[str, str]
    rows: tuple[Row, ...]
    covered_by: Mapping[str, str]
    untried: tuple[str, ...] = ()
    graphs: tuple[Traced, ...] = ()

    def row(self, name: str) -> Row:
        """The row that stands for an architecture. Raises KeyError."""
        wanted = self.covered_by[name]
        return next(row for row in self.rows if row.name == wanted)

    def smallest_of_modules(self) -> tuple[Row, ...]:
        """The row with the fewest parameters of every module of timm."""
        smallest: dict[str, Row] = {}
        for row in sorted(self.rows, key=lambda row: row.params):
            smallest.setdefault(row.module, row)
        return tuple(smallest.values())

    def matching(self, pattern: str) -> dict[str, Row]:
        """Tried architectures by a shell pattern; without wildcards, those that contain it.

        Raises UsageError where no architecture matches, or only untried ones.
        """
        glob = pattern if any(mark in pattern for mark in "*?[") else f"*{pattern}*"
        rows = {row.name: row for row in self.rows}
        found = {name: rows[by] for name, by in self.covered_by.items() if fnmatchcase(name, glob)}
        if not found and any(fnmatchcase(name, glob) for name in self.untried):
            raise UsageError(
                f"No structure of {pattern!r} was tried for the support matrix.",
                hint="prunecli inspect MODEL tries it now.",
            )
        if not found:
            raise UsageError(f"No architecture matches {pattern!r}.", hint=nearest(pattern, self.covered_by))
        return found


def stored_matrix() -> Matrix:
    """The matrix that this version of prunecli was released with. Raises PruneError where the file is broken."""
    try:
        return Matrix.model_validate_json(STORED.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PruneError(f"The support matrix of this installation is damaged ({one_line(error)}).") from None
