"""What a user sees while a job runs: bars on a terminal, one plain line a stage elsewhere, nothing with --quiet."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_DOING: Final = {
    "load": "Loading the model",
    "plan": "Tracing the network, planning the cut, proving it",
    "dense": "Measuring the dense model",
    "cuts": "Cutting the whole model to less and less",
    "grow": "Letting a small penalty grow on all channels",
    "push": "Pushing the channels that leave towards zero",
    "regularise": "Making the weights more orthogonal",
    "gate": "Learning which channels are needed",
    "regularised": "Measuring what the phase made of the model",
    "pruned": "Measuring the pruned model",
    "recover": "Trying recovery steps",
    "orthp": "Orthogonalising the pruned model",
    "finetune": "Fine-tuning",
    "export": "Exporting and verifying in a fresh process",
}
_LINES: Final = {"stage", "plan", "curve", "cut", "recovery", "block", "epoch", "trial", "warning", "verify", "resume"}


class ProgressDisplay:
    """Turns a job's events into progress on standard error. A context manager, and the callable the job notifies."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet
        self._bars: Progress | None = None
        self._stage: TaskID | None = None
        self._training: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if self._quiet:
            return
        match event:
            case {"event": "start", "name": "trial", "arm": arm, "lr": lr, "number": number, "of": of}:
                self._begin(f"Fine-tuning {number} of {of}: {arm} at LR {lr:g}")
            case {"event": "start", "name": str(name)}:
                self._begin(_DOING.get(name, name))
            case {"event": "step", "step": int(step), "steps": int(steps), **rest}:
                self._train(step, steps, rest)
            case {"event": name} if name in _LINES:
                self._line(event)

    def _begin(self, text: str) -> None:
        if self._bars is None:
            self._console.print(f"{text} …", highlight=False, soft_wrap=True)
            return
        if self._stage is not None:
            self._bars.remove_task(self._stage)
        self._stage = self._bars.add_task(text, total=None)

    def _train(self, step: int, steps: int, values: dict[str, Any]) -> None:
        if self._bars is None:
            return
        if self._training is None:
            self._training = self._bars.add_task("steps", total=steps)
        loss = values.get("loss")
        text = f"step {step}/{steps}" + (f"  loss {loss:.3f}" if isinstance(loss, float) else "")
        self._bars.update(self._training, completed=step, total=steps, description=text)

    def _line(self, event: dict[str, Any]) -> None:
        console = self._bars.console if self._bars else self._console
        console.print(_sentence(event), highlight=False, markup=False, soft_wrap=True)


def _sentence(event: dict[str, Any]) -> str:
    """One event as one line."""
    match event:
        case {"event": "stage", "name": name, "seconds": seconds, **rest}:
            top1 = f", top-1 {rest['top1']:.2f} %" if rest.get("top1") is not None else ""
            jsv = f", mean JSV {rest['jsv']:.3g}" if rest.get("jsv") is not None else ""
            return f"{name}: {seconds:.1f} s{top1}{jsv}"
        case {"event": "plan", "groups": groups, "proof": proof}:
            return f"plan: {groups} coupled groups are cut; {proof}"
        case {"event": "curve", "name": name, "kl": kl}:
            measured = ", ".join(f"{value:.3g} at {kept}" for kept, value in sorted(kl.items(), reverse=True))
            return f"cut alone, {name}: KL {measured or 'not measured'}"
        case {"event": "cut", "asked": asked, "kl": kl, "recovery": recovery, "top1": top1}:
            accuracy = "" if top1 is None else f", top-1 {top1:.2f} %"
            return f"{asked:g} % of the multiply-adds, {recovery}: KL {kl:.3g}{accuracy}"
        case {"event": "recovery", "name": name, "rule": rule}:
            return f"recovery {name}: {rule}"
        case {"event": "block", "block": block, "blocks": blocks, "name": name, "before": before, "after": after}:
            return f"block {block}/{blocks} {name}: error {before:.3g} to {after:.3g}"
        case {"event": "epoch", "epoch": epoch, "epochs": epochs, **rest}:
            figures = (
                ("loss", "train_loss", ".3f"),
                ("top-1", "top1", ".2f"),
                ("factor", "reg", ".3g"),
                ("pushed norm", "norm", ".3g"),
                ("penalty", "penalty", ".3g"),
                ("open gates", "open", ".1%"),
                ("LR", "lr", ".3g"),
            )
            shown = [f"{name} {rest[key]:{form}}" for name, key, form in figures if isinstance(rest.get(key), float)]
            return f"epoch {epoch}/{epochs}: {', '.join(shown)}"
        case {"event": "trial", "arm": arm, "lr": lr, "top1": top1, "diverged": diverged, "number": number, "of": of}:
            ended = "diverged" if diverged else f"top-1 {top1:.2f} %"
            return f"{arm} at LR {lr:g}: {ended} ({number} of {of})"
        case {"event": "warning", "text": text}:
            return f"warning: {text}"
        case {"event": "resume", **rest}:
            return f"resumed: {', '.join(f'{key} {value}' for key, value in rest.items())}"
        case {"event": "verify", "reload_max_abs_diff": difference}:
            return f"verified: reloads in a fresh process with logits equal to {difference:.1e}"
        case _:
            return str(event)
