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
    """Number of parameters in tensors without a prunable axis, for one reason (stated without the place)."""

    reason: str
    params: int


class Trial(Value):
    """One cut that was tried.

    Attributes:
        target: target as a user would write it.
        params: parameters that are left, ``None`` where the cut failed.
        macs: multiply-adds of one image that are left, ``None`` where the cut failed.
        relative_error: distance between the pruned and the silenced dense net (``proof.equivalence``).
        notes: sentences on what the plan left whole.
        problem: reason why the cut failed, else ``None``.
    """

    target: str
    params: int | None = None
    macs: int | None = None
    relative_error: float | None = None
    notes: tuple[str, ...] = ()
    problem: str | None = None


class Row(Value):
    """One architecture that was tried.

    Attributes:
        name: name of the timm architecture.
        model_args: keyword arguments for ``timm.create_model``.
        module: module of ``timm.models`` (or ``prunecli``) that defines the architecture.
        model_class: name of the model's class.
        structure: digest of everything but sizes; equal for architectures that differ only there.
        input_size: channels, height and width of an image.
        params: number of parameters of the dense model.
        macs: multiply-adds of one image through the dense model.
        groups: number of coupled groups.
        prunable_share: share of the parameters that lie in tensors with a prunable axis, 0 to 1.
        frozen: the other parameters by reason, largest share first.
        unknown_ops: operators without a rule.
        trials: cuts that were tried, with the outcome of their proofs.
        reload_max_abs_diff: largest change of a logit when the last cut is exported and reloaded, 0 where bit-equal.
        graph_seconds: time to build the dependency graph on one thread, seconds.
        graph_mib: peak memory of building the graph, beyond the model's own, MiB.
        problem: reason why nothing was tried, else ``None``.
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
        """``exact`` where every cut was proved and the last one reloads bit for bit, else ``refused``."""
        proved = self.trials and all(t.problem is None and t.relative_error is not None for t in self.trials)
        return "exact" if proved and self.reload_max_abs_diff == 0 else "refused"

    @property
    def reason(self) -> str:
        """Why the row is refused, what the plan left whole, or why most unprunable parameters are so; else empty."""
        problems = [self.problem, *(trial.problem for trial in self.trials)]
        reason = next((problem for problem in problems if problem), None)
        if reason is None and self.reload_max_abs_diff:
            reason = f"reloads with a difference of {self.reload_max_abs_diff:.1e}"
        if reason is None and self.reload_max_abs_diff is None:
            reason = "it could not be reloaded"
        if reason is None:
            reason = next((note for trial in self.trials for note in trial.notes), None)
        if reason is None and self.frozen and self.prunable_share < 0.99:
            reason = f"{self.frozen[0].params / self.params:.1%} stay: {self.frozen[0].reason}"
        return reason or ""

    @property
    def worst_error(self) -> float | None:
        """The largest relative error over the trials; ``None`` where no trial has one."""
        return max((t.relative_error for t in self.trials if t.relative_error is not None), default=None)

    def to_mapping(self) -> dict[str, Any]:
        """A JSON document: the stored fields and the status."""
        return self.model_dump(mode="json") | {"status": self.status}


class Traced(Value):
    """One architecture whose graph was built at full size and without weights; nothing was cut.

    ``seconds`` is the time to build the graph, ``prunable_share`` as in `Row`.
    """

    name: str
    params: int = 0
    groups: int = 0
    prunable_share: float = 0.0
    seconds: float = 0.0
    problem: str | None = None


class Matrix(Value):
    """The whole matrix, as stored.

    Attributes:
        rows: one row for each structure that was tried.
        covered_by: architecture → name of the row that represents its structure.
        untried: architectures whose structure has no row.
        graphs: one entry for each architecture.
        date: day on which the matrix was made.
        command: command that made it.
        versions: package → version it was made with.
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
        """The row that represents an architecture's structure.

        Raises:
            KeyError: the architecture is unknown or untried.
        """
        wanted = self.covered_by[name]
        return next(row for row in self.rows if row.name == wanted)

    def smallest_of_modules(self) -> tuple[Row, ...]:
        """The row with the fewest parameters for each module of timm."""
        smallest: dict[str, Row] = {}
        for row in sorted(self.rows, key=lambda row: row.params):
            smallest.setdefault(row.module, row)
        return tuple(smallest.values())

    def matching(self, pattern: str) -> dict[str, Row]:
        """Tried architectures by name, each with the row that represents it.

        Args:
            pattern: shell pattern of the name; without wildcards, a part of the name.

        Raises:
            UsageError: no architecture matches, or only untried ones.
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
    """The matrix that this version of prunecli was released with.

    Raises:
        PruneError: the file is missing or broken.
    """
    try:
        return Matrix.model_validate_json(STORED.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PruneError(f"The support matrix of this installation is damaged ({one_line(error)}).") from None
