"""What a user sees while a job runs."""

from __future__ import annotations

import io

from rich.console import Console

from prunecli.cli.progress import ProgressDisplay


def said(*events: dict[str, object], quiet: bool = False, terminal: bool = False) -> str:
    page = io.StringIO()
    with ProgressDisplay(Console(file=page, width=40, force_terminal=terminal), quiet=quiet) as display:
        for event in events:
            display(event)
    return page.getvalue()


PLAN = {"event": "plan", "groups": 4, "proof": "pruned net equals silenced dense net to 5.3e-16"}
STEP = {"event": "step", "step": 3, "steps": 9, "loss": 0.5}
WARNING = {"event": "warning", "text": "[red]not markup[/red]"}


def test_an_event_is_one_line_of_a_log_however_narrow() -> None:
    lines = said({"event": "start", "name": "plan"}, PLAN, STEP, WARNING).splitlines()
    assert lines == [
        "Tracing the network, planning the cut, proving it …",
        "plan: 4 coupled groups are cut; pruned net equals silenced dense net to 5.3e-16",
        "warning: [red]not markup[/red]",
    ]


def test_quiet_says_nothing() -> None:
    assert said({"event": "start", "name": "plan"}, PLAN, WARNING, quiet=True) == ""


def test_a_terminal_gets_bars() -> None:
    shown = said({"event": "start", "name": "finetune"}, STEP, terminal=True)
    assert "step 3/9  loss 0.500" in shown


def test_an_unknown_event_is_not_shown() -> None:
    assert said({"event": "saved", "path": "x"}) == ""
