"""Ctrl-C and SIGTERM: everything that prunecli does about them.

SIGTERM, which a container being stopped gets, means what Ctrl-C means. The first signal does what suits the phase in
which it comes; a second one never waits.

==================  ================================================  ========================================
phase               the first signal                                  the second signal
==================  ================================================  ========================================
before a command    ends the process (`die_of_ctrl_c`)
importing           one sentence and exit code 130, without an        ends the process
                    exception (`raised_at_once`)
between trainings   raises KeyboardInterrupt, and again after 0.25 s  ends the process
                    where that was swallowed (`raised_at_once`)
training            requests a stop (`stop_requests`): the step,      raises KeyboardInterrupt, without a save
                    validation batch or write under way is finished,
                    then `until` raises `Stopped` and the loop saves
after the last      is handed on to the handler outside, as if it     raises KeyboardInterrupt
step                had come between trainings
reporting failure   ends the process
==================  ================================================  ========================================

`training.loop` turns Stopped and KeyboardInterrupt into an InterruptedRunError, and `run.job` into one that names the
run's folder (`interrupted_as`). The command line reports either with exit code 130. Writes need no protection of their
own: cut off anywhere, `files.write_atomic` leaves the old file or the new one.

Python delivers signals to the main thread only; in another thread the context managers below do nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, TypeVar

from prunecli.errors import ExitCode, InterruptedRunError

Batch = TypeVar("Batch")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_NOTICED_WITHIN: Final = 0.25  # seconds after which an interrupt that nothing has reacted to is raised again


# ---------------------------------------------------------------------------------------------- the process


def die_of_ctrl_c() -> None:
    """Let Ctrl-C end the process without a traceback, until a command begins."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def raised_at_once(farewell: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Raise KeyboardInterrupt at the first Ctrl-C or SIGTERM; the second one ends the process.

    Args:
        farewell: what is done before the process exits during an import, where nothing can be raised.

    Yields:
        A function after which any further signal ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def end_at_once() -> None:
        for number in former:
            signal.signal(number, signal.SIG_DFL)

    def interrupt(_number: int, frame: FrameType | None) -> None:
        end_at_once()
        if _importing(frame):  # an exception in the C++ half of an import may abort the process (torch's does)
            farewell()
            os._exit(ExitCode.INTERRUPTED)
        # Raised inside a finaliser, a weak reference's callback or another library's bare ``except`` it would be lost.
        signal.setitimer(signal.ITIMER_REAL, _NOTICED_WITHIN)
        raise KeyboardInterrupt

    def insist(number: int, frame: FrameType | None) -> None:
        if _interrupt_under_way():
            signal.setitimer(signal.ITIMER_REAL, _NOTICED_WITHIN)
        else:
            interrupt(number, frame)

    former = {number: signal.signal(number, interrupt) for number in _SIGNALS}
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


# ---------------------------------------------------------------------------------------------- a training


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """Raised between batches once a stop was requested: nothing is half done."""


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop between two steps; a second one acts at once.

    A request that the body did not notice any more is handed on to the former handler.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    requested: list[int] = []

    def request(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        requested.append(number)
        stop.set()

    former = {number: signal.signal(number, request) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if requested:  # not reached where the body raised Stopped or an error made from it
        signal.raise_signal(requested[0])


def stop_if_asked(stop: threading.Event) -> None:
    """Raises Stopped once a stop was requested."""
    if stop.is_set():
        raise Stopped


def until(stop: threading.Event, loader: Iterable[Batch]) -> Iterator[Batch]:
    """The loader's batches; raises Stopped before the next one once a stop was requested."""
    batches = iter(loader)
    while True:
        stop_if_asked(stop)
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError:  # Ctrl-C also ends the loader's worker processes
            if stop.is_set():
                raise Stopped from None
            raise
        yield batch


# ---------------------------------------------------------------------------------------------- a run


@contextmanager
def interrupted_as(explain: Callable[[], InterruptedRunError]) -> Iterator[None]:
    """Raise what ``explain`` returns where the body is interrupted, by a signal or by a part that has stopped already.

    Raises:
        InterruptedRunError: the body was interrupted.
    """
    try:
        yield
    except (KeyboardInterrupt, InterruptedRunError):
        raise explain() from None
