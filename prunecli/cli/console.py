"""The edge of the process: data to stdout, sentences to stderr, every failure as one sentence and its exit code."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from types import FrameType
from typing import TextIO

import typer
from rich.console import Console, RenderableType

from prunecli.errors import ExitCode, PruneError

_stdout: ContextVar[TextIO | None] = ContextVar("stdout", default=None)
_HEARD_WITHIN = 0.25  # seconds after which an interrupt that nothing has reacted to is raised again


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
        with _interruptible() as from_now_on_at_once, _log_to_stderr(quiet=quiet), redirect_stdout(sys.stderr):
            try:
                yield
            except typer.Exit:
                raise
            except (KeyboardInterrupt, Exception) as error:
                from_now_on_at_once()
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


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """SIGTERM (a container being stopped) is taken as Ctrl-C; the second signal of either kind ends the process.

    Yields a function that makes any further signal end the process. Signals reach the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def end_at_once() -> None:
        for number in former:
            signal.signal(number, signal.SIG_DFL)

    def interrupt(_signal: int, frame: FrameType | None) -> None:
        end_at_once()
        if _importing(frame):  # an exception in the C++ half of an import may abort the process (torch's does)
            errors().show_cursor(show=True)
            tell("Error: Interrupted.")
            os._exit(ExitCode.INTERRUPTED)
        # Raised inside a finaliser, a weak reference's callback or another library's bare ``except`` it would be lost.
        signal.setitimer(signal.ITIMER_REAL, _HEARD_WITHIN)
        raise KeyboardInterrupt

    def insist(number: int, frame: FrameType | None) -> None:
        if _interrupt_under_way():
            signal.setitimer(signal.ITIMER_REAL, _HEARD_WITHIN)
        else:
            interrupt(number, frame)

    former = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    unused = signal.signal(signal.SIGALRM, insist)
    try:
        yield end_at_once
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, unused)
        for number, handler in former.items():
            signal.signal(number, handler)


def _interrupt_under_way() -> bool:
    """Whether a KeyboardInterrupt, or an error raised because of one, is on its way up."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


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
    signal.signal(signal.SIGINT, signal.SIG_DFL)
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
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - a stream for the life of the process
