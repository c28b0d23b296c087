"""The edge of the process: data to stdout, sentences to stderr, every failure as one sentence and its exit code."""

from __future__ import annotations

import ctypes
import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Final, TextIO

import typer
from rich.console import Console, RenderableType

from prunecli.errors import ExitCode, PruneError
from prunecli.interrupts import die_of_ctrl_c, raised_at_once

_M_TRIM_THRESHOLD: Final = -1  # both as in glibc's malloc.h
_M_MMAP_MAX: Final = -4

_stdout: ContextVar[TextIO | None] = ContextVar("stdout", default=None)


# ---------------------------------------------------------------------------------------------- what is printed


def show(document: object, view: RenderableType, *, as_json: bool) -> None:
    """Data to stdout: JSON for programs, tables for people."""
    if as_json:
        write(json.dumps(document, allow_nan=False) + "\n")
        return
    page = io.StringIO()
    Console(file=page, force_terminal=_output().isatty() or None).print(view)
    write(page.getvalue())


def write(text: str) -> None:
    """Text to stdout at once. A reader that has seen enough (``| head``) is no failure; a full disk is a PruneError."""
    out = _output()
    try:
        out.write(text)
        out.flush()
    except OSError as error:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - what is still buffered must go somewhere at exit
            os.dup2(nowhere.fileno(), out.fileno())
        if not isinstance(error, BrokenPipeError):
            raise PruneError(f"Cannot write to standard output: {error.strerror}.") from None


def tell(sentence: str) -> None:
    """One line to stderr, never wrapped: a terminal does that, and a log should not."""
    errors().print(sentence, markup=False, highlight=False, soft_wrap=True)


def errors() -> Console:
    """Stderr, for sentences and progress."""
    return Console(stderr=True)


def _output() -> TextIO:
    return _stdout.get() or sys.stdout


# ---------------------------------------------------------------------------------------------- how a command ends


@contextmanager
def reported(*, quiet: bool = False) -> Iterator[None]:
    """Every failure as one sentence on stderr and its exit code; a traceback only with --debug.

    Whatever a library prints meanwhile goes to stderr, so that stdout holds nothing but the command's own data.
    """
    token = _stdout.set(sys.stdout)
    try:
        with raised_at_once(_farewell) as end_at_once, _log_to_stderr(quiet=quiet), redirect_stdout(sys.stderr):
            try:
                yield
            except typer.Exit:
                raise
            except (KeyboardInterrupt, Exception) as error:
                end_at_once()
                code, sentence = _explained(error)
                if os.environ.get("PRUNECLI_DEBUG"):
                    traceback.print_exc()
                tell(f"Error: {sentence}")
            else:
                return
    finally:
        _stdout.reset(token)
    raise typer.Exit(int(code))


def _explained(error: BaseException) -> tuple[ExitCode, str]:
    match error:
        case PruneError():
            return error.exit_code, str(error)
        case KeyboardInterrupt():
            return ExitCode.INTERRUPTED, "Interrupted."
        case MemoryError():
            return ExitCode.FAILED, "Out of memory. Lower data.batch_size or spectrum.chunk."
        case OSError(strerror=str(reason), filename=str(file)):
            return ExitCode.FAILED, f"{file}: {reason}."
    if "out of memory" in str(error).lower():
        return ExitCode.FAILED, "The device ran out of memory. Lower data.batch_size or spectrum.chunk."
    first = str(error).strip().splitlines()[:1]
    return ExitCode.FAILED, f"Unexpected {type(error).__name__}: {first[0] if first else ''} (--debug shows where)."


def _farewell() -> None:
    errors().show_cursor(show=True)
    tell("Error: Interrupted.")


@contextmanager
def _log_to_stderr(*, quiet: bool) -> Iterator[None]:
    """Our own warnings as plain lines, those of other libraries nowhere: what matters of them we say ourselves."""
    handler = logging.NullHandler() if quiet else _Lines()
    nowhere = logging.NullHandler()
    ours, root = logging.getLogger("prunecli"), logging.getLogger()
    ours.addHandler(handler)
    root.addHandler(nowhere)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        root.removeHandler(nowhere)


class _Lines(logging.Handler):
    """Warnings and worse as lines on stderr."""

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        tell(f"warning: {record.getMessage()}")


# ---------------------------------------------------------------------------------------------- the process


def settle_process() -> None:
    """What only a process of our own may do: hush libraries, and let no signal end in a traceback.

    Python's warnings come back with ``-W`` or ``PYTHONWARNINGS``, and with ``--debug``.
    """
    die_of_ctrl_c()
    if not sys.warnoptions and not os.environ.get("PRUNECLI_DEBUG"):
        warnings.simplefilter("ignore")
    # OpenMP's threads spin while they wait, so that on a shared core each little operator costs a time slice. Read when
    # torch is loaded, hence here: 16 Jacobians took 3 to 7 s beside another process on two cores, and 0.2 s like this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.stdout = sys.stdout or _nowhere()  # none where the caller closed it
    sys.stderr = sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    _keep_freed_memory()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _keep_freed_memory() -> None:
    """Let glibc hand freed blocks out again instead of giving each back to the system.

    By default it maps every tensor above 32 MiB anew, and the system clears its pages: passes of 64 images of 224 px
    through tf_efficientnet_lite0 took 42 s like that and 15 s like this, half of it for page faults.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - a stream for the life of the process
