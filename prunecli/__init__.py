"""prunecli: structured pruning of pretrained vision models, with isometry recovery. Importing it loads no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prunecli.measure.jacobian import jacobian_spectrum
    from prunecli.recipe.recipe import Recipe
    from prunecli.recovery.orthogonal import orthogonalize_
    from prunecli.run.export import load
    from prunecli.run.pipeline import compress
    from prunecli.training.recommended_lr import recommend_lr
    from prunecli.values.report import Report

_HOMES = {
    "Recipe": "prunecli.recipe.recipe",
    "Report": "prunecli.values.report",
    "compress": "prunecli.run.pipeline",
    "jacobian_spectrum": "prunecli.measure.jacobian",
    "load": "prunecli.run.export",
    "orthogonalize_": "prunecli.recovery.orthogonal",
    "recommend_lr": "prunecli.training.recommended_lr",
}
__all__ = ["Recipe", "Report", "__version__", "compress", "jacobian_spectrum", "load", "orthogonalize_", "recommend_lr"]


def __getattr__(name: str) -> Any:
    """Resolve public names on first use, so that importing the package stays free of torch."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return list(__all__)
