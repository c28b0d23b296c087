"""The run folder: what lands on disk, written atomically, loaded strictly, verified in a fresh process.

Nothing here is a pickle; writes are atomic (``prunecli.files``).
"""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from prunecli import __version__
from prunecli.errors import PruneError, UnsupportedError, UsageError, VerificationError
from prunecli.files import explained, read_json, read_tensors, sha256_of, write_json, write_tensors, write_text
from prunecli.models import user_function
from prunecli.models.build import build, input_spec
from prunecli.models.outputs import as_rows, logits_of
from prunecli.models.tensors import named_tensors
from prunecli.models.user_function import Function
from prunecli.recipe.recipe import Recipe
from prunecli.surgery.structure import fill_, shape_, structure_of
from prunecli.values.plan import Cost, ModelRef, Plan, Structure
from prunecli.values.report import Report, VerifyReport
from prunecli.values.value import Value

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"
PLAN: Final = "plan.json"
REPORT: Final = "report.json"
PAGE: Final = "report.html"
RECIPE: Final = "recipe.yaml"
LOG: Final = "log.jsonl"
REFERENCE: Final = "reference.safetensors"
CHECKPOINTS: Final = "checkpoints"
OURS: Final = (WEIGHTS, CONFIG, PLAN, REPORT, PAGE, RECIPE, LOG, REFERENCE)

V = TypeVar("V", bound=Value)

log = logging.getLogger("prunecli")

_LOCK_SECONDS: Final = 8  # loader processes of a killed run hold its lock until they notice, some five seconds later
_LEFT_BEHIND: Final = re.compile(r"\.(?:.+)\.(?:json|jsonl|yaml|html|safetensors)\.\d+\.tmp")  # see files.write_atomic

_VERIFY_IMAGES: Final = 2
# Reloading on the machine that exported is bit-equal; another CPU or library may round a float32 sum differently.
_VERIFY_TOLERANCE: Final = 1e-3


class Exported(Value):
    """The ``prunecli`` part of config.json: what a loader needs beside the weights."""

    version: str
    model: ModelRef
    structure: Structure
    weights_sha256: str
    weights_bytes: int
    base: Cost
    final: Cost


# ---------------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """One run on disk. ``path`` exists once ``open_`` or ``create`` returned."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def finished(self) -> bool:
        """The report is written last, so its presence means that every gate was passed."""
        return (self.path / REPORT).is_file()

    @property
    def begun(self) -> bool:
        """The recipe is written first."""
        return (self.path / RECIPE).is_file()

    def log(self, event: str, **values: object) -> None:
        """Append one line to log.jsonl."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values}, default=str)
        with explained(self.path / LOG), (self.path / LOG).open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")

    def recipe(self) -> Recipe:
        """The resolved recipe of this run. Raises UsageError where the folder holds none."""
        return Recipe.from_file(self.path / RECIPE)

    def plan(self) -> Plan:
        """Raises PruneError where plan.json is missing or wrong."""
        return read_value(Plan, self.path / PLAN)

    def report(self) -> Report:
        """Raises PruneError where report.json is missing or wrong."""
        return read_value(Report, self.path / REPORT)

    def clear(self) -> None:
        """Remove what a run writes, and nothing else.

        The report goes first and the recipe stays, so that a kill halfway leaves an unfinished run, not a broken
        finished one or a folder that looks foreign.
        """
        for name in (REPORT, *(name for name in OURS if name != RECIPE)):
            (self.path / name).unlink(missing_ok=True)
        for file in sorted(self.checkpoints.rglob("*"), reverse=True):
            if file.is_dir() and not file.is_symlink():
                file.rmdir()
            else:
                file.unlink()

    def sweep(self) -> None:
        """Remove half-written files that a killed process left behind."""
        for folder in (self.path, self.checkpoints, self.checkpoints / "finetune"):
            for file in folder.glob(".*.tmp"):
                if _LEFT_BEHIND.fullmatch(file.name):
                    file.unlink(missing_ok=True)

    @property
    def foreign(self) -> bool:
        """Whether the folder holds something and is no run: all but what a start that was killed early leaves."""
        if self.begun or not self.path.is_dir():
            return False
        return any(
            not _LEFT_BEHIND.fullmatch(entry.name) and (entry != self.checkpoints or any(entry.iterdir()))
            for entry in self.path.iterdir()
        )


def locate(out: Path | None, *, model: str, resume: bool, force: bool) -> RunFolder:
    """The folder of a new or continued run; nothing is written yet (see ``prepare_``).

    Args:
        out: what the user named; none picks ``runs/NAME-N`` (with ``resume`` the newest unfinished one).
        model: names the folder.
        resume: continue what is there.
        force: replace a run that is there. Files that no run writes are never touched.

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
    """Keep other processes of ours out of a folder while this one works in it; the lock ends with the process.

    Raises UsageError where another process works in it.
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

    Raises as ``locate``, whose answer may have changed since.
    """
    with explained(folder.path):
        _require_usable(folder, resume=resume, force=force)
        if force:
            folder.clear()
        folder.sweep()
    write_text(folder.path / RECIPE, recipe.to_yaml())
    with explained(folder.path):
        folder.checkpoints.mkdir(exist_ok=True)


def is_run(path: str | Path) -> bool:
    """Whether a folder holds an exported model of ours."""
    config = Path(path) / CONFIG
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
        if (path / RECIPE).is_file() and not (path / REPORT).is_file():
            return path
    raise UsageError(f"There is no unfinished run of {_slug(model)} in ./runs.", hint="Name its folder with --out.")


# ---------------------------------------------------------------------------------------------- export and load


def export(folder: RunFolder, model: nn.Module, *, ref: ModelRef, base: Cost, final: Cost) -> Structure:
    """Write model.safetensors, config.json and the reference logits that ``verify`` compares with.

    Args:
        folder: where to.
        model: the pruned model.
        ref: what it was made from; where that is a function, it is called.
        base: cost of the dense model.
        final: cost of this one.

    Raises:
        PruneError: the disk refuses, or what ``ref`` names makes another module than before.
    """
    function = Function.of(ref)
    plain = build(ref) if function is None else user_function.make(function, title=f"Model {function}")
    structure = structure_of(plain, model, whole=function is not None)
    held = named_tensors(model)
    tensors = {**model.state_dict(), **{name: held[name] for name in structure.extra}}
    path = folder.path / WEIGHTS
    write_tensors(path, tensors, {"prunecli": __version__, "architecture": ref.name})
    exported = Exported(
        version=__version__,
        model=ref,
        structure=structure,
        weights_sha256=sha256_of(path),
        weights_bytes=path.stat().st_size,
        base=base,
        final=final,
    )
    hub = {
        "architecture": ref.name if ref.is_function else ref.name.partition(".")[0],
        "num_classes": ref.num_classes,
        "num_features": int(getattr(model, "num_features", 0)),
        "model_args": ref.args,
        "pretrained_cfg": ref.pretrained_cfg,
    }
    write_json(folder.path / CONFIG, {**hub, "prunecli": exported.model_dump(mode="json")})
    logits = _reference_logits(model, ref)
    write_tensors(folder.path / REFERENCE, {"logits": logits})
    return structure


def load(path: str | Path, *, model: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The pruned model of a run folder, in eval mode on the CPU, bit-equal to the exported one.

    Only config.json and model.safetensors are read; the dense model is never run and nothing is unpickled. Nothing that
    the folder names is imported or called: a model that a function of the user's made needs that function again.

    Args:
        path: the run folder.
        model: makes the plain module that was pruned (``lambda: nets.tiny(width=16)``); not for models of timm.

    Raises:
        UsageError: there is no such folder; ``model`` is missing, fails, or is given for a model of timm.
        PruneError: the folder holds no model of ours, or a broken one.
    """
    loaded, _ = load_exported(path, model)
    return loaded


def load_exported(path: str | Path, function: Callable[[], object] | None = None) -> tuple[nn.Module, Exported]:
    """``load`` with the record beside the weights; a ``Function`` has to be the recorded one. Raises as ``load``."""
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{folder} does not exist or is no folder.")
    run = RunFolder(path=folder)
    if run.begun and not run.finished and not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} holds an unfinished run, so there is no model yet.", hint="--resume continues it.")
    exported = read_config(folder)
    tensors = read_tensors(folder / WEIGHTS)
    if lost := sorted(set(exported.structure.extra) - set(tensors)):
        raise PruneError(f"{folder / WEIGHTS} lacks {lost[0]}, which {CONFIG} names.")
    model = _plain(folder, exported.model, function)
    try:
        shape_(model, exported.structure)
        fill_(model, tensors)
    except UnsupportedError as error:
        raise _misfit(folder, exported.model, error) from None
    return model.eval(), exported


def _plain(folder: Path, ref: ModelRef, function: Callable[[], object] | None) -> nn.Module:
    """The plain module of a folder that may be a stranger's: what it records is built by timm, or only compared.

    Raises UsageError where a function is needed and another one, or none, was given.
    """
    _require_consent(folder, ref, function)
    if function is None:
        return build(ref)
    return user_function.make(function, title=f"Model {function}" if isinstance(function, Function) else "The function")


def _require_consent(folder: Path, ref: ModelRef, function: Callable[[], object] | None) -> None:
    if not ref.is_function:
        if function is not None:
            raise UsageError(f"{folder} holds a model of timm, which no function makes.", hint="Leave --model out.")
        return
    recorded = Function(name=ref.name, args=ref.args)
    if function is None:
        raise UsageError(
            f"{folder} holds a model made by {str(recorded)!r}, which is not run unless you name it.",
            hint="If you trust that code: --model package.module:function with its --model-arg K=V, or in Python "
            "prunecli.load(DIR, model=FUNCTION).",
        )
    if isinstance(function, Function) and function != recorded:
        raise UsageError(f"{folder} holds a model made by {str(recorded)!r}, not by {str(function)!r}.")


def _misfit(folder: Path, ref: ModelRef, error: UnsupportedError) -> PruneError:
    if ref.is_function:
        return PruneError(f"{folder} does not fit the module that was made for it: {error.message}")
    return PruneError(
        f"{folder} does not fit {ref.name} of timm {version('timm')}: {error.message}",
        hint=f"It was made with timm {ref.timm}." if ref.timm != version("timm") else None,
    )


def read_config(folder: Path) -> Exported:
    """The ``prunecli`` record of config.json. Raises PruneError."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or "prunecli" not in config:
        raise PruneError(f"{folder / CONFIG} is not from prunecli.", hint="`local-dir:PATH` loads plain timm folders.")
    try:
        return Exported.model_validate(config["prunecli"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PruneError(f"{folder / CONFIG} is damaged at prunecli.{where}: {first['msg']}.") from None


# ---------------------------------------------------------------------------------------------- verify


def verify(path: Path, function: Function | None = None) -> VerifyReport:
    """Reload the exported model in a fresh process and compare logits, class count and bytes.

    Args:
        path: the run folder.
        function: what made the model, where it was a function of the user's; the process finds what this one finds.

    Raises:
        UsageError: no such folder; the function is missing, is another one, or fails.
        VerificationError: it does not reload to what was exported, with the reason.
    """
    if not path.is_dir():
        raise UsageError(f"{path} does not exist or is no folder.")
    if (ref := _recorded_model(path)) is not None:
        _require_consent(path, ref, function)
    # -P and PYTHONPATH: the child gets this very package, and no module that happens to lie in the user's folder.
    command = [sys.executable, "-P", "-m", "prunecli.run.folder", str(path.resolve())]
    places = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    if function is not None:
        command += [function.name, json.dumps(dict(function.args))]
        places += [os.path.abspath(place) for place in sys.path]  # noqa: PTH100 - text in, text out
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(  # noqa: S603 our own interpreter
        command, capture_output=True, text=True, check=False, env=environment
    )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise VerificationError(f"{path} could not be reloaded in a fresh process: {last[0]}") from None
    if answer.get("usage"):
        raise UsageError(answer["error"])
    if "error" in answer:
        raise VerificationError(f"{path} does not verify: {answer['error']}")
    result = VerifyReport.model_validate(answer)
    if not result.ok:
        raise VerificationError(
            f"{path} reloads to another model: logits differ by {result.reload_max_abs_diff:.3g}"
            + ("" if result.classes_equal else " and the class count changed")
            + "."
        )
    return result


def _recorded_model(path: Path) -> ModelRef | None:
    """What the config says, None where it cannot be read: the fresh process will say why."""
    try:
        return read_config(path).model
    except PruneError:
        return None


def verify_here(path: Path, function: Function | None = None) -> VerifyReport:
    """The comparison itself, in this process. Raises PruneError."""
    exported = read_config(path)
    weights = path / WEIGHTS
    if not weights.is_file():
        raise PruneError(f"{weights} is missing.")
    if weights.stat().st_size != exported.weights_bytes or sha256_of(weights) != exported.weights_sha256:
        raise PruneError(f"{weights} is not the file that was exported (size or digest differ).")
    reference = read_tensors(path / REFERENCE).get("logits")
    if reference is None:
        raise PruneError(f"{path / REFERENCE} holds no logits.")
    model, _ = load_exported(path, function)
    logits = _reference_logits(model, exported.model)
    classes = exported.model.num_classes
    classes_equal = logits.shape == reference.shape and classes in {0, logits.shape[-1]}
    difference = float((logits - reference).abs().max()) if logits.shape == reference.shape else float("inf")
    scale = float(reference.abs().max())
    close = difference <= _VERIFY_TOLERANCE * scale
    return VerifyReport(
        reload_max_abs_diff=difference if difference < float("inf") else -1.0,
        classes_equal=classes_equal,
        ok=close and classes_equal and bool(torch.isfinite(logits).all()),
    )


def reference_input(size: tuple[int, int, int]) -> Tensor:
    """Two fixed images [2, C, H, W] with values in [-1, 1): integer arithmetic, so the same on every machine."""
    count = _VERIFY_IMAGES * size[0] * size[1] * size[2]
    hashed = (torch.arange(count, dtype=torch.int64) * 2654435761 + 40503) % 2**24
    return (hashed.to(torch.float32) / 2**23 - 1).reshape(_VERIFY_IMAGES, *size)


@torch.no_grad()
def _reference_logits(model: nn.Module, ref: ModelRef) -> Tensor:
    """Logits of the reference input, or all features where there is no classifier.

    On one CPU thread, whose sums do not depend on how work was shared out.
    """
    cpu_model = model if next(model.parameters()).device.type == "cpu" else copy.deepcopy(model).cpu()
    was_training, threads = cpu_model.training, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        output = cpu_model.eval()(reference_input(input_spec(ref).size))
    finally:
        torch.set_num_threads(threads)
    cpu_model.train(was_training)
    return (logits_of(output) if ref.num_classes else as_rows(output, _VERIFY_IMAGES)).float()


def read_value(kind: type[V], path: Path) -> V:
    """A value type from its JSON file. Raises PruneError naming the file and the place in it."""
    values = read_json(path)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise PruneError(f"{path} is damaged: {error.errors()[0]['msg']}.") from None


def _main(path: str, name: str | None = None, args: str = "{}") -> None:
    """Entry of the fresh process: one JSON line on stdout."""
    function = Function(name=name, args=json.loads(args)) if name else None
    try:
        answer = verify_here(Path(path), function).model_dump()
    except PruneError as error:
        answer = {"error": str(error), "usage": isinstance(error, UsageError)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
