"""A job as a user would run it, as a record of a table."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from prunecli.recipe.recipe import Recipe
from prunecli.run import pipeline


def recorded_job(recipe: Recipe) -> dict[str, Any]:
    """Run a job that fine-tunes: accuracies of its stages, recovery, rate, and what is left of the cost."""
    with tempfile.TemporaryDirectory() as scratch:
        report = pipeline.compress(recipe, out=Path(scratch) / "run")
    top1 = {stage.name: stage.top1 for stage in report.stages}
    assert report.finetune is not None
    return {
        "dense": top1["dense"],
        "pruned": top1["pruned"],
        "recovered": top1["recovered"],
        "kept": [step.name for step in report.recovery if step.kept],
        "top1": report.finetune.last_top1,
        "best": report.finetune.best_top1,
        "lr": float(f"{report.finetune.lr:.3g}"),
        "macs": round(report.final["macs"] / report.base["macs"], 4),
        "params": round(report.final["params"] / report.base["params"], 4),
    }
