"""Learning rates that a retraining schedule prescribes itself: LR rewinding, SLR, CLR and ALLR. Pure.

Their peak is the rate that the base was trained at (``finetune.original``), lowered for ALLR by how little was cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from prunecli.errors import UsageError
from prunecli.recipe.schedules import OriginalSchedule
from prunecli.recipe.settings import FinetuneSettings
from prunecli.values.learning_rate import LRReport, PrescribedSchedule, Rule

NEEDS_A_CUT: Final = "finetune.schedule allr reads how much of the weights was cut, which only `compress` knows."

_RENDA: Final = "Renda et al. 2020, arXiv 2003.02389"
_LE_HUA: Final = "Le and Hua 2021, arXiv 2105.03193"
_ZIMMER: Final = "Zimmer et al. 2023, arXiv 2111.00843"


@dataclass(frozen=True, kw_only=True)
class RemovedWeights:
    """How much of the weights a cut took away.

    Attributes:
        sparsity: the share of the parameters removed.
        norm_dense: the Euclidean norm over all parameters, biases and BatchNorm included, before the cut.
        norm_pruned: the same norm after the cut.
    """

    sparsity: float
    norm_dense: float
    norm_pruned: float

    @property
    def norm_share(self) -> float:
        """``||W - W_p|| / ||W||``, the share of the norm that is gone, with the removed entries as zeros of W_p.

        Then ``||W - W_p||^2 = ||W||^2 - ||W_p||^2``, as the authors of ALLR have it in their code too.
        """
        return math.sqrt(abs(self.norm_dense**2 - self.norm_pruned**2)) / self.norm_dense


def adaptive_peak(removed: RemovedWeights, *, peak: float, epochs: int, original_epochs: float) -> float:
    """ALLR's first rate: ``clip(peak * d / sqrt(s), peak * epochs / original_epochs, peak)``.

    d is the share of the weights' norm and s the share of the parameters that the cut took away. The paper states it
    for single masked weights. Source: Zimmer, Spiegel and Pokutta, "How I Learned to Stop Worrying and Love Retraining"
    (ICLR 2023, arXiv 2111.00843).

    Args:
        removed: what the cut took away.
        peak: the highest rate the base was trained at.
        epochs: the length of the retraining.
        original_epochs: the length of the base's own training.

    Raises:
        ValueError: a sparsity outside (0, 1), or a rate, norm or number of epochs that is not positive.
    """
    if not 0 < removed.sparsity < 1:
        raise ValueError(f"sparsity must lie in (0, 1), not {removed.sparsity}")
    if not (peak > 0 and removed.norm_dense > 0 and removed.norm_pruned >= 0 and epochs > 0 and original_epochs > 0):
        raise ValueError("peak, norms and epochs must be above 0")
    adapted = peak * removed.norm_share / math.sqrt(removed.sparsity)
    return min(max(adapted, peak * epochs / original_epochs), peak)


def prescribed_lr(settings: FinetuneSettings, *, epochs: int, removed: RemovedWeights | None) -> LRReport | None:
    """The peak that the schedule itself prescribes; ``None`` where the rules of ``recommended_lr`` decide.

    Args:
        settings: the fine-tuning, of which ``schedule`` and ``original`` are read.
        epochs: the length of the retraining.
        removed: what the cut took away, read by ALLR only; ``None`` where nothing was cut.

    Raises:
        UsageError: ALLR where nothing was cut.
    """
    original, name = settings.original, settings.schedule.kind
    if original is None:
        return None
    match name:
        case "rewind":
            lr, source = _rate_at(original, original.epochs - epochs), _RENDA
            replayed = f"the last {epochs} of the base's {original.epochs} epochs"
            reason = f"LR rewinding replays {replayed}, which begin at {lr:g}."
        case "slr" | "clr":
            lr, source = original.lr, _LE_HUA
            reason = f"{name.upper()} climbs to the base's own peak rate {lr:g}."
        case "allr":
            if removed is None or removed.sparsity <= 0:
                raise UsageError(NEEDS_A_CUT)
            return _allr(original, removed, epochs=epochs)
        case _:
            return None
    inputs = PrescribedSchedule(
        schedule=name, epochs=epochs, original_peak_lr=original.lr, original_epochs=original.epochs
    )
    rule = Rule(name=name, lr=lr, reason=reason, source=source)
    return LRReport(recommended=lr, rule=reason, inputs=inputs, rules=(rule,))


def _allr(original: OriginalSchedule, removed: RemovedWeights, *, epochs: int) -> LRReport:
    lr = adaptive_peak(removed, peak=original.lr, epochs=epochs, original_epochs=original.epochs)
    reason = (
        f"ALLR: the cut took {removed.norm_share:.1%} of the weights' norm with {removed.sparsity:.1%} of the "
        f"parameters, so {lr:g} of the base's peak {original.lr:g}."
    )
    inputs = PrescribedSchedule(
        schedule="allr",
        epochs=epochs,
        original_peak_lr=original.lr,
        original_epochs=original.epochs,
        norm_dense=removed.norm_dense,
        norm_pruned=removed.norm_pruned,
        norm_removed=removed.norm_share,
        sparsity=removed.sparsity,
    )
    rule = Rule(name="allr", lr=lr, reason=reason, source=_ZIMMER)
    return LRReport(recommended=lr, rule=reason, inputs=inputs, rules=(rule,))


def _rate_at(original: OriginalSchedule, epoch: int) -> float:
    """The original schedule's rate at the start of ``epoch`` (from 0)."""
    share = max(epoch, 0) / original.epochs
    if original.schedule == "cosine":
        return original.min_lr + (original.lr - original.min_lr) * (1 + math.cos(math.pi * share)) / 2
    passed = sum(milestone <= share for milestone in original.milestones)
    return max(original.lr * original.gamma**passed, min(original.min_lr, original.lr))
