"""Stopping a loop between two steps, never inside one, so that what is saved is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch import Tensor


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """Raised between batches once a stop was requested: nothing is half done."""


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop between two steps; a second one acts at once.

    A request that came too late for the body to hear it is handed on to the former handler. Signals reach the main
    thread only, so elsewhere the request is simply never made.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    asked: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        asked.append(number)
        stop.set()

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if asked:
        signal.raise_signal(asked[0])


def stop_if_asked(stop: threading.Event) -> None:
    """Raises Stopped once a stop was requested."""
    if stop.is_set():
        raise Stopped


def until(stop: threading.Event, loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
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
