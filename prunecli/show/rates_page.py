"""Measured learning rates as one self-contained HTML file, in the frame and the looks of a run's report."""

from __future__ import annotations

from prunecli.show import plots, wording
from prunecli.show.templates import rendered
from prunecli.values.measured_rates import MeasuredRates


def rates_page(found: MeasuredRates, *, recipe: str) -> str:
    """The whole page.

    Args:
        found: all figures.
        recipe: the resolved recipe as YAML.
    """
    return rendered(
        "rates.html.j2",
        title=f"Fine-tuning rates of {found.model}",
        scope=wording.rates_scope(found),
        warnings=found.warnings,
        verdicts=found.verdicts,
        plot=plots.rates_plot(found),
        start_columns=wording.START_COLUMNS,
        starts=wording.start_rows(found),
        trial_columns=wording.TRIAL_COLUMNS,
        trials=wording.rate_rows(found),
        recommended=f"{found.lr.recommended:g}",
        rule=found.lr.rule,
        evidence=wording.evidence_rows(found.lr),
        versions=[*found.versions.items(), ("seed", str(found.seed)), ("recipe sha256", found.recipe_sha256)],
        recipe=recipe,
    )
