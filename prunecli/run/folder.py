"""The run folder: the names of its files, who may work in it, and what may be replaced there.

Nothing in a run folder is a pickle; writes are atomic (``prunecli.files``).
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from prunecli.errors import UsageError
from prunecli.files import explained, read_value, write_text
from prunecli.recipe.recipe import Recipe
from prunecli.values.plan import Plan
from prunecli.values.report import PhaseName, Report

# what leaves weights for a resume
Trained = Literal["grow", "regularise", "push", "gate", "recovered", "orthp", "finetuned"]

log = logging.getLogger("prunecli")

_LOCK_SECONDS: Final = 8  # loader processes of a killed run hold its lock until they notice, some five seconds later
_LEFT_BEHIND: Final = re.compile(r"\.(?:.+)\.(?:json|jsonl|yaml|html|safetensors)\.\d+\.tmp")  # see files.write_atomic


# ---------------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """One run on disk, and the only place that names its files. ``path`` exists once ``prepare_`` has returned."""

    path: Path

    @property
    def weights_file(self) -> Path:
        """The exported model."""
        return self.path / "model.safetensors"

    @property
    def config_file(self) -> Path:
        """What a loader needs beside the weights."""
        return self.path / "config.json"

    @property
    def plan_file(self) -> Path:
        """Which channels of which coupled group stay."""
        return self.path / "plan.json"

    @property
    def report_file(self) -> Path:
        """All figures. Written last, so its presence means that every gate was passed."""
        return self.path / "report.json"

    @property
    def page_file(self) -> Path:
        """The report for people."""
        return self.path / "report.html"

    @property
    def rates_file(self) -> Path:
        """All figures of a measurement of learning rates, which has this in place of the report. Written last."""
        return self.path / "lr.json"

    @property
    def rates_page(self) -> Path:
        """The same for people."""
        return self.path / "lr.html"

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe. Written first."""
        return self.path / "recipe.yaml"

    @property
    def log_file(self) -> Path:
        """One JSON line an event."""
        return self.path / "log.jsonl"

    @property
    def reference_file(self) -> Path:
        """The logits that ``verify`` compares with."""
        return self.path / "reference.safetensors"

    @property
    def files(self) -> tuple[Path, ...]:
        """What a run writes beside its checkpoints; what marks it as finished comes first."""
        return (
            self.report_file,
            self.rates_file,
            self.weights_file,
            self.config_file,
            self.plan_file,
            self.page_file,
            self.rates_page,
            self.recipe_file,
            self.log_file,
            self.reference_file,
        )

    @property
    def checkpoints(self) -> Path:
        """Where the state for a resume lies."""
        return self.path / "checkpoints"

    @property
    def progress_file(self) -> Path:
        """What the finished stages measured."""
        return self.checkpoints / "progress.json"

    @property
    def gates_file(self) -> Path:
        """Learnt gates |a| by group name, until the run is finished."""
        return self.checkpoints / "gates.safetensors"

    def weights_after(self, name: Trained) -> Path:
        """The weights that a stage or phase left, until the run is finished."""
        return self.checkpoints / f"{name}.safetensors"

    def training_state(self, name: PhaseName | Literal["finetune"]) -> Path:
        """The folder of a training's own checkpoints."""
        return self.checkpoints / name

    @property
    def finished(self) -> bool:
        """True if the run has ended well: its report is written last, or what stands for it."""
        return self.report_file.is_file() or self.rates_file.is_file()

    @property
    def begun(self) -> bool:
        """True if a run was started here: the recipe is written first."""
        return self.recipe_file.is_file()

    def log(self, event: str, **values: object) -> None:
        """Append one line to log.jsonl."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values}, default=str)
        with explained(self.log_file), self.log_file.open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")

    def recipe(self) -> Recipe:
        """The resolved recipe of this run.

        Raises:
            UsageError: the folder holds none, or one of another version.
        """
        return Recipe.from_file(self.recipe_file)

    def plan(self) -> Plan:
        """The plan of this run.

        Raises:
            PruneError: plan.json is missing or wrong.
        """
        return read_value(Plan, self.plan_file)

    def report(self) -> Report:
        """The report of this run.

        Raises:
            PruneError: report.json is missing or wrong.
        """
        return read_value(Report, self.report_file)

    def clear(self) -> None:
        """Remove what a run writes, and nothing else.

        The report goes first and the recipe stays, so that a kill halfway leaves an unfinished run, not a broken
        finished one or a folder that looks foreign.
        """
        for file in self.files:
            if file != self.recipe_file:
                file.unlink(missing_ok=True)
        for file in sorted(self.checkpoints.rglob("*"), reverse=True):
            if file.is_dir() and not file.is_symlink():
                file.rmdir()
            else:
                file.unlink()

    def drop_stage_weights(self) -> None:
        """Remove what only a resume needs: the weights between the stages, and the gates."""
        for file in (*map(self.weights_after, get_args(Trained)), self.gates_file):
            file.unlink(missing_ok=True)

    def drop_training_state(self, name: PhaseName | Literal["finetune"]) -> None:
        """Remove the checkpoints of a training that has ended, for another one that follows it."""
        for file in self.training_state(name).glob("state-*.safetensors"):
            file.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove half-written files that a killed process left behind."""
        states = map(self.training_state, (*get_args(PhaseName), "finetune"))
        for folder in (self.path, self.checkpoints, *states):
            for file in folder.glob(".*.tmp"):
                if _LEFT_BEHIND.fullmatch(file.name):
                    file.unlink(missing_ok=True)

    @property
    def foreign(self) -> bool:
        """True if the folder holds files that prunecli did not write. Leftovers of a killed start do not count."""
        if self.begun or not self.path.is_dir():
            return False
        return any(
            not _LEFT_BEHIND.fullmatch(entry.name) and (entry != self.checkpoints or any(entry.iterdir()))
            for entry in self.path.iterdir()
        )


def locate(out: Path | None, *, model: str, resume: bool, force: bool) -> RunFolder:
    """The folder of a new or continued run; nothing is written yet (see ``prepare_``).

    Args:
        out: the folder that the user named; ``None`` picks ``runs/NAME-N`` (with ``resume`` the newest unfinished one).
        model: the model of the recipe, from which NAME is made.
        resume: whether to continue the run that is there.
        force: whether to replace the run that is there. Files that no run writes are never touched.

    Raises:
        UsageError: the folder holds a run and neither ``resume`` nor ``force`` was given, or holds something else.
        PruneError: nothing can be written there.
    """
    if resume and force:
        raise UsageError("--resume and --force contradict each other.", hint="--force starts again from nothing.")
    if out is None:
        out = _newest_unfinished(model) if resume else _next_free(model)
    folder = RunFolder(path=out)
    with explained(out):
        _require_usable(folder, resume=resume, force=force)
    if folder.begun and force and is_run(model) and Path(model).resolve() == out.resolve():
        raise UsageError(f"{out} is the model to start from and cannot be replaced.", hint="Choose another --out.")
    return folder


def _require_usable(folder: RunFolder, *, resume: bool, force: bool) -> None:
    """Raises what ``locate`` promises, and OSError where the folder cannot be looked into."""
    path = folder.path
    if folder.finished and folder.begun and resume:
        raise UsageError(f"The run in {path} is finished: there is nothing to resume.")
    if folder.finished and folder.begun and not force:
        raise UsageError(f"{path} holds a finished run.", hint="Choose another --out, or --force to replace it.")
    if folder.begun and not (resume or force):
        raise UsageError(f"{path} holds an unfinished run.", hint="--resume continues it, --force starts again.")
    if resume and not folder.begun:
        raise UsageError(f"{path} holds no run to resume.", hint="Start one without --resume.")
    if folder.foreign:
        raise UsageError(f"{path} is not empty and holds no run of prunecli.", hint="Choose another --out.")
    _require_writable(path)


def _require_writable(path: Path) -> None:
    """Say at once, and not after minutes of planning, that a folder cannot be made or written. Raises OSError."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(there))
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, "read-only file system", str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "permission denied", str(there))


@contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    """Keep other prunecli processes out of a folder while this one works in it; the lock ends with the process.

    The folder itself is locked. filelock would need a lock file in it, which a killed run and a file system without
    locks leave behind, and which another user who may write the folder may not open.

    Raises:
        UsageError: Another process works in the folder.
        PruneError: The folder cannot be made or read.
    """
    with explained(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder.path, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _locked(handle):
            if time.monotonic() > deadline:
                raise UsageError(f"Another process is working in {folder.path}.", hint="Choose another --out.")
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        log.info("The run folder cannot be locked: %s", error)
    return True


def prepare_(folder: RunFolder, recipe: Recipe, *, resume: bool, force: bool) -> None:
    """Make the folder, with ``force`` without what an earlier run left there, and write the recipe.

    Raises:
        UsageError: as for ``locate``; the folder is checked again because it may have changed.
        PruneError: nothing can be written there.
    """
    with explained(folder.path):
        _require_usable(folder, resume=resume, force=force)
        if force:
            folder.clear()
        folder.sweep()
    write_text(folder.recipe_file, recipe.to_yaml())
    with explained(folder.path):
        folder.checkpoints.mkdir(exist_ok=True)


def is_run(path: str | Path) -> bool:
    """Whether a folder holds an exported model of ours."""
    config = RunFolder(path=Path(path)).config_file
    try:
        return "prunecli" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _slug(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition(":")[2].rpartition("/")[2]) or "run"


def _numbered(model: str) -> dict[int, Path]:
    pattern = re.compile(re.escape(_slug(model)) + r"-(\d+)")
    runs = Path("runs")
    found = {int(m[1]): p for p in (runs.iterdir() if runs.is_dir() else ()) if (m := pattern.fullmatch(p.name))}
    return dict(sorted(found.items()))


def _next_free(model: str) -> Path:
    return Path("runs") / f"{_slug(model)}-{max(_numbered(model), default=0) + 1}"


def _newest_unfinished(model: str) -> Path:
    for path in reversed(_numbered(model).values()):
        run = RunFolder(path=path)
        if run.begun and not run.finished:
            return path
    raise UsageError(f"There is no unfinished run of {_slug(model)} in ./runs.", hint="Name its folder with --out.")
