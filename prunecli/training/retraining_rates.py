"""Learning rates that a retraining schedule prescribes itself: LR rewinding, SLR, CLR and ALLR. Pure, as ``lr``.

Their peak is the rate that the base was trained at (``finetune.original``), lowered for ALLR by how little was cut.
"""

from __future__ import annotations

import math
from typing import Any, Final

from prunecli.errors import UsageError
from prunecli.recipe.schedules import OriginalSchedule, RetrainingSchedule
from prunecli.recipe.settings import FinetuneSettings
from prunecli.values.report import LRReport

NEEDS_A_CUT: Final = "finetune.schedule allr reads how much of the weights was cut, which only `compress` knows."

_RENDA: Final = "Renda et al. 2020, arXiv 2003.02389"
_LE_HUA: Final = "Le and Hua 2021, arXiv 2105.03193"
_ZIMMER: Final = "Zimmer et al. 2023, arXiv 2111.00843"


def adaptive_peak(
    *, peak: float, norm_dense: float, norm_pruned: float, sparsity: float, epochs: int, original_epochs: int
) -> float:
    """ALLR's first rate: ``clip(peak * d / sqrt(s), peak * epochs / original_epochs, peak)``.

    ``d = ||W - W_p|| / ||W||`` is the share of the weights' norm that the cut took away. With the removed entries as
    zeros of W_p, ``||W - W_p||^2 = ||W||^2 - ||W_p||^2``, as the authors' code has it too. Stated for single masked
    weights; for removed channels the sparsity is the share of the parameters that left. Source: Zimmer, Spiegel and
    Pokutta, "How I Learned to Stop Worrying and Love Retraining" (ICLR 2023, arXiv 2111.00843).

    Args:
        peak: the highest rate the base was trained at.
        norm_dense: Euclidean norm over all parameters, biases and BatchNorm included, before the cut.
        norm_pruned: the same after the cut.
        sparsity: share of the parameters removed, s.
        epochs: of the retraining.
        original_epochs: of the base's own training.

    Raises:
        ValueError: a sparsity outside (0, 1), or a rate, norm or number of epochs that is not positive.
    """
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity must lie in (0, 1), not {sparsity}")
    if not (peak > 0 and norm_dense > 0 and norm_pruned >= 0 and epochs > 0 and original_epochs > 0):
        raise ValueError("peak, norms and epochs must be above 0")
    distance = math.sqrt(abs(norm_dense**2 - norm_pruned**2)) / norm_dense
    return min(max(peak * distance / math.sqrt(sparsity), peak * epochs / original_epochs), peak)


def prescribed_lr(
    settings: FinetuneSettings, *, epochs: int, sparsity: float, norm_dense: float, norm_pruned: float
) -> LRReport | None:
    """The peak that the schedule itself prescribes, with the numbers behind it; None where the rules of ``lr`` decide.

    Args:
        settings: whose ``schedule`` and ``original`` are read.
        epochs: of the retraining.
        sparsity: share of the parameters removed; 0 where nothing was cut.
        norm_dense: as for ``adaptive_peak``.
        norm_pruned: as for ``adaptive_peak``.

    Raises:
        UsageError: ALLR where nothing was cut.
    """
    original, kind = settings.original, settings.schedule.kind
    if original is None or not isinstance(settings.schedule, RetrainingSchedule):
        return None
    given: dict[str, Any] = {
        "schedule": kind,
        "epochs": epochs,
        "original_peak_lr": original.lr,
        "original_epochs": original.epochs,
    }
    if kind == "rewind":
        lr = _rate_at(original, original.epochs - epochs)
        says = f"LR rewinding replays the last {epochs} of the base's {original.epochs} epochs, which begin at {lr:g}."
        return _report(lr, "rewind", says, _RENDA, given)
    if kind == "allr":
        return _allr(original, given, sparsity=sparsity, norm_dense=norm_dense, norm_pruned=norm_pruned)
    name = kind.upper()
    return _report(original.lr, kind, f"{name} climbs to the base's own peak rate {original.lr:g}.", _LE_HUA, given)


def _allr(
    original: OriginalSchedule, given: dict[str, Any], *, sparsity: float, norm_dense: float, norm_pruned: float
) -> LRReport:
    if sparsity <= 0:
        raise UsageError(NEEDS_A_CUT)
    lr = adaptive_peak(
        peak=original.lr,
        norm_dense=norm_dense,
        norm_pruned=norm_pruned,
        sparsity=sparsity,
        epochs=given["epochs"],
        original_epochs=original.epochs,
    )
    distance = math.sqrt(abs(norm_dense**2 - norm_pruned**2)) / norm_dense
    says = (
        f"ALLR: the cut took {distance:.1%} of the weights' norm with {sparsity:.1%} of the parameters, "
        f"so {lr:g} of the base's peak {original.lr:g}."
    )
    measured = {"norm_dense": norm_dense, "norm_pruned": norm_pruned, "norm_removed": distance, "sparsity": sparsity}
    return _report(lr, "allr", says, _ZIMMER, given | measured)


def _rate_at(original: OriginalSchedule, epoch: int) -> float:
    """The original schedule's rate at the start of ``epoch`` (from 0)."""
    share = max(epoch, 0) / original.epochs
    if original.schedule == "cosine":
        return original.min_lr + (original.lr - original.min_lr) * (1 + math.cos(math.pi * share)) / 2
    passed = sum(milestone <= share for milestone in original.milestones)
    return max(original.lr * original.gamma**passed, min(original.min_lr, original.lr))


def _report(lr: float, name: str, says: str, source: str, evidence: dict[str, Any]) -> LRReport:
    rule = {"name": name, "lr": lr, "says": says, "source": source}
    return LRReport(recommended=lr, rule=says, evidence={**evidence, "rules": [rule]})
