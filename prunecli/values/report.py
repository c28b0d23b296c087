"""Report: what happened, every number with its unit. The shape of ``report.json`` (INTERFACE section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from prunecli.values.learning_rate import LRReport
from prunecli.values.value import Value

StageName = Literal["dense", "regularised", "pruned", "recovered", "finetuned"]
PhaseName = Literal["grow", "push", "regularise", "gate"]


class SpectrumSummary(Value):
    """Singular values of the input-logit Jacobian over all samples (METHODS 1.2, eval mode).

    ``lanczos`` is an estimate: ``mean_error`` is the standard error of its mean, ``min`` an upper bound, ``max`` and
    ``condition`` lower ones.
    """

    method: Literal["exact", "lanczos"] = "exact"
    mean_error: float | None = None

    mean: float
    std: float
    min: float
    max: float
    condition: float | None = Field(
        description="mean over samples of largest / smallest singular value; None where every smallest one is zero"
    )
    samples: int


class Accuracy(Value):
    """Evaluation on a labelled split; percentages are 0 to 100, loss is mean cross-entropy in nats."""

    top1: float
    top5: float | None
    loss: float
    samples: int


class Stage(Value):
    """The model as one stage left it; a field is ``None`` where that was not measured.

    Attributes:
        seconds: wall time of the stage.
        params: number of parameters.
        macs: multiply-adds of one image.
        bytes: size of the tensors in the state_dict.
        top1: validation accuracy, percent.
        top5: validation accuracy among the five largest logits, percent.
        loss: mean validation cross-entropy, nats.
        jsv: singular values of the input-logit Jacobian.
        notes: sentences on what was not done.
    """

    name: StageName
    seconds: float
    params: int
    macs: int
    bytes: int
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    jsv: SpectrumSummary | None = None
    notes: tuple[str, ...] = ()


class RecoveryStep(Value):
    """What one recovery step did, and whether the rule kept it; accuracies in percent, losses in nats."""

    name: str
    kept: bool
    rule: str
    loss_before: float | None = None
    loss_after: float | None = None
    kl_before: float | None = Field(
        default=None, description="KL divergence from the dense model, nats, held-out images"
    )
    kl_after: float | None = None
    top1_before: float | None = None
    top1_after: float | None = None
    jsv_before: SpectrumSummary | None = None
    jsv_after: SpectrumSummary | None = None
    residual: float | None = Field(default=None, description="largest |WW^T/gain^2 - I| entry over recovered layers")
    shrinkage: Mapping[str, float] = Field(
        default_factory=dict,
        description="by layer that was solved: how far its second moments were shrunk, 0 to 1; near 1: too few images",
    )
    seconds: float = 0.0


class TargetResult(Value):
    """The target and the value reached, in the metric's own unit; ``reachable`` is the lowest and highest value."""

    metric: str
    asked: float
    reached: float
    reachable: tuple[float, float]


class LayerReport(Value):
    """One layer before and after; singular values of its weight matrix [out, in*k*k], largest first."""

    name: str
    out_before: int
    out_after: int
    sv_before: tuple[float, ...] = ()
    sv_after: tuple[float, ...] = ()


class PredictedLoss(Value):
    """What the plan expected the cut to cost, and what it cost: KL divergences from the dense model's answers, nats."""

    predicted_kl: float = Field(description="sum of what each unit loses alone")
    recovered_kl: float | None = Field(description="after the recovery, on the held-out images; null: not measured")


class LatencyReport(Value):
    """Paired latency of base and final model: medians in milliseconds, for one batch."""

    device: str
    batch: int
    base_ms: float
    final_ms: float
    ratio: float
    noise: float


class PhaseCost(Value):
    """Length of a training phase before the cut, which counts as training when budgets are compared."""

    name: PhaseName
    method: str
    steps: int
    epochs: float
    lr: float


class PhaseReport(PhaseCost):
    """Record of a training phase before the cut. ``history`` begins with the state before it, as epoch 0."""

    reg: float | None = Field(default=None, description="factor of the L2 penalty at the end")
    penalty_before: float | None = Field(
        default=None, description="sum of the Gram losses (tpp) or of the regulariser over all layers, unweighted"
    )
    penalty_after: float | None = None
    norm_before: float | None = Field(default=None, description="Frobenius norm of the channels that are pushed")
    norm_after: float | None = None
    open_before: float | None = Field(default=None, description="abp: open gates as a share of all")
    open_after: float | None = None
    distill: float = Field(default=0.0, description="share of the loss that is distillation from the dense model")
    seconds: float
    history: tuple[dict[str, float], ...] = ()


class FinetuneReport(Value):
    """Record of the fine-tuning: its budget in epochs, and accuracy in percent after the last and the best epoch."""

    epochs: int
    steps: int
    lr: float
    schedule: str
    distill: float = Field(default=0.0, description="share of the loss that is distillation from the dense model")
    best_epoch: int | None = None
    best_top1: float | None = None
    last_top1: float | None = None
    history: tuple[dict[str, float], ...] = ()


class VerifyReport(Value):
    """The reloaded model against the exported one, in a fresh process."""

    reload_max_abs_diff: float
    classes_equal: bool
    ok: bool


class Report(Value):
    """All figures of a run (``report.json``)."""

    schema_version: Literal[1] = 1
    model: str
    base: dict[str, Any]
    final: dict[str, Any]
    stages: tuple[Stage, ...]
    target: TargetResult | None
    layers: tuple[LayerReport, ...] = ()
    recovery: tuple[RecoveryStep, ...] = ()
    phases: tuple[PhaseReport, ...] = ()
    sensitivity: PredictedLoss | None = Field(default=None, description="with ranking loss")
    total_epochs: float | None = Field(
        default=None, description="epochs of training in all, phases before the cut and fine-tuning; None: no training"
    )
    lr: LRReport | None = None
    finetune: FinetuneReport | None = None
    latency: LatencyReport | None = None
    verify: VerifyReport | None = None
    recipe_sha256: str
    versions: dict[str, str]
    seed: int
    warnings: tuple[str, ...] = ()
