"""Every failure prunecli names, one class an exit code (INTERFACE: exit codes are part of the public promise).

A message is one plain sentence that names the value and the place; ``hint`` is the next step.
Nothing here prints: the command line turns these into text and an exit status in one place.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit status of the process."""

    OK = 0
    FAILED = 1
    USAGE = 2
    TARGET = 3
    VERIFICATION = 4
    NOTHING_PRUNED = 5
    UNSUPPORTED = 6
    INTERRUPTED = 130


class PruneError(Exception):
    """A run that cannot go on: the world holds the wrong thing (a truncated file, a NaN loss, a full disk).

    Attributes:
        exit_code: exit status of a command that ends with this error.
        message: one plain sentence that names the value and the place.
        hint: next step for the user, or ``None``.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class DivergedError(PruneError):
    """A loss or a weight that is no longer a finite number."""


class UsageError(PruneError):
    """A name that does not exist, or a value that cannot be parsed."""

    exit_code = ExitCode.USAGE


class TargetError(PruneError):
    """The target lies outside the reachable range, or was missed by more than its tolerance."""

    exit_code = ExitCode.TARGET


class VerificationError(PruneError):
    """The exported model does not reload to the model that was exported."""

    exit_code = ExitCode.VERIFICATION


class NothingPrunedError(PruneError):
    """The plan removes no channel at all."""

    exit_code = ExitCode.NOTHING_PRUNED


class UnsupportedError(PruneError):
    """The architecture, or one place in it, cannot be pruned correctly; refused before any work."""

    exit_code = ExitCode.UNSUPPORTED


class InterruptedRunError(PruneError):
    """Ctrl-C or SIGTERM: state is saved, ``--resume`` continues."""

    exit_code = ExitCode.INTERRUPTED


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint for a misspelt name: its nearest match, all choices where they are few, or nothing.

    Args:
        name: name as the user typed it.
        known: names that exist.
    """
    choices = sorted(known)
    match = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if match:
        return f"Did you mean {match[0]!r}?"
    return f"Known: {', '.join(choices)}." if 0 < len(choices) <= 30 else ""


def one_line(error: BaseException, limit: int = 240) -> str:
    """The message of an exception as one line without its final full stop.

    Args:
        error: any exception; without a message, the name of its type is returned.
        limit: most characters of the result; a longer message is cut off.
    """
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listed(names: Sequence[str], limit: int) -> str:
    """Names as one text: ``a, b, c``, or ``a, b (+3 more)`` where there are more than ``limit``."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} (+{len(names) - limit} more)"
