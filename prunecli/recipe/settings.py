"""The sections of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from prunecli.values.value import Value

Criterion = Literal["l1", "l2", "group_norm", "bn_scale", "lamp", "fpgm", "taylor", "random"]
Loss = Literal["ce", "cskd", "pskd", "dlb"]
Ranking = Literal["local", "global", "isomorphic"]
Count = Annotated[int, Field(gt=0)]
RecoverStep = Literal["auto", "lstsq", "repair", "orthp", "blend", "bn"]
RETRAINING = ("rewind", "slr", "clr", "allr")


class DataSettings(Value):
    """Where images come from. ``name`` is an ImageFolder path, a timm dataset name, or ``digits``."""

    name: str | None = None
    dir: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    batch_size: int = Field(default=128, gt=0)
    workers: int = Field(default=0, ge=0)
    augment: Literal["auto", "timm", "crop_flip", "none"] = Field(
        default="auto",
        description="auto: none for written digits, crop_flip (pad 4, random crop, flip) up to 64 px, timm's own above",
    )
    train_limit: int | None = Field(default=None, gt=0, description="use only the first N training images")
    val_limit: int | None = Field(default=None, gt=0, description="use only the first N validation images")
    unreadable_limit: int = Field(default=10, ge=0, description="how many unreadable images a run survives")
    input_size: tuple[Count, Count, Count] | None = Field(
        default=None, description="channels, height, width that the model is fed with; none: the checkpoint's own"
    )
    mean: tuple[float, ...] | None = Field(
        default=None, min_length=1, description="of each channel, for pixels in [0, 1]; none: the checkpoint's own"
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(default=None, min_length=1)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is set of ``input_size``, ``mean`` and ``std``, as JSON values: it goes before the checkpoint's own."""
        given = {"input_size": self.input_size, "mean": self.mean, "std": self.std}
        return {key: list(value) for key, value in given.items() if value is not None}


class PruneSettings(Value):
    """What may be cut, and how channels are ranked."""

    criterion: Criterion = "l1"
    ranking: Ranking = "local"
    graph: Literal["axes", "torch_pruning"] = "axes"
    attention: Literal["heads", "head_dim"] = Field(
        default="heads", description="which factor of an attention width is cut"
    )
    select: tuple[str, ...] = Field(
        default=("*",), description="name patterns: a group is cut if a producing layer matches"
    )
    exclude: tuple[str, ...] = Field(default=(), description="name patterns of layers that keep all channels")
    round_to: int = Field(
        default=8, gt=0, description="kept widths are multiples of this where the width allows it; 1 is off"
    )
    min_width: int = Field(default=1, gt=0)
    max_ratio: float = Field(default=0.995, gt=0, lt=1, description="largest share of one group that may leave")
    calibration_images: int = Field(default=128, gt=0, description="images for criteria that need gradients")


class RecoverSettings(Value):
    """Recovery after the cut. ``steps: [auto]`` tries what fits and keeps what the stated rule says helps."""

    steps: tuple[RecoverStep, ...] = Field(
        default=("auto",), description="auto alone, or steps applied in this order; [] switches recovery off"
    )
    lstsq_images: int = Field(default=256, gt=0, description="training images for lstsq and repair; no label is read")
    ridge: float = Field(
        default=1e-3, ge=0, description="lstsq: added to the diagonal, as a share of the kept inputs' mean variance"
    )
    blend: float = Field(
        default=0.3, ge=0, le=1, description="how far blend goes: 0 nowhere, 1 to equal singular values"
    )
    orthp_method: Literal["qr", "polar", "newton_schulz", "approximate", "delta", "scratch"] = Field(
        default="qr", description="delta and scratch forget the weights; they are there for comparison"
    )
    gain: Literal["auto"] | float = "auto"
    bn_images: int = Field(default=2048, gt=0, description="training images for BN re-estimation")
    probe_steps: int = Field(default=30, ge=0, description="optimiser steps of the probe that decides what auto keeps")

    @model_validator(mode="after")
    def _steps_fit_together(self) -> Self:
        if "auto" in self.steps and len(self.steps) > 1:
            raise ValueError("auto chooses the steps itself, so it stands alone")
        if "lstsq" in self.steps[1:]:
            raise ValueError("lstsq starts from the dense weights and would undo what stands before it; put it first")
        return self


class PhaseSettings(Value):
    """The training phase before the cut: every method but oneshot and epsd. Counts are optimiser steps.

    The defaults are the papers' for CIFAR; for ImageNet reg_every is 5 and stabilise 40000.
    """

    lr: float | None = Field(
        default=None,
        gt=0,
        description="constant; none: 1e-3, with abp 0.1; the optimiser is SGD, with finetune.weight_decay",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1)
    penalty: Literal["growing", "fixed"] = Field(
        default="growing", description="tpp, greg; fixed: reg_ceiling from the first step on, for `steps`"
    )
    reg_step: float = Field(default=1e-4, gt=0, description="what the penalty's factor grows by")
    reg_every: int = Field(default=10, gt=0, description="steps from one growth to the next")
    reg_ceiling: float = Field(default=1.0, gt=0, description="where the growth stops")
    steps: int = Field(
        default=50_000, gt=0, description="length with a fixed penalty, and of kernorth, orthconv and abp"
    )
    stabilise: int = Field(default=10_000, ge=0, description="steps at reg_ceiling after that (tpp, greg)")
    zero_every: int = Field(
        default=100, gt=0, description="tpp: while stabilising, one more group is set to zero every so many steps"
    )
    gram_weight: float = Field(default=1000.0, ge=0, description="tpp: of the decorrelation, times the factor")
    bn_term: bool | None = Field(
        default=None, description="push norm scales and shifts of the channels too; none: with tpp, not with greg"
    )
    variant: Literal[1, 2] = Field(
        default=1, description="greg; 2: channels are picked after a small penalty has grown on all of them"
    )
    pick_step: float = Field(default=1e-5, gt=0, description="greg 2: what the factor grows by before they are picked")
    pick_ceiling: float = Field(default=1e-2, gt=0, description="greg 2: the factor at which they are picked")
    regulariser_weight: float = Field(default=0.1, gt=0, description="kernorth, orthconv")
    gate_l1: float = Field(
        default=0.0, ge=0, description="abp: pushes the gates towards closing; 1e-4 is the authors' figure"
    )


class EpsdSettings(Value):
    """Of ``method: epsd``: the few training steps whose outcome says what each channel is worth."""

    steps: int = Field(default=3, gt=0, description="plain SGD steps, a batch each; one more batch is judged on")
    lr: float = Field(default=0.1, gt=0, description="of these steps")


class SaoSettings(Value):
    """Of ``init: sao``. A layer's widths may not allow just this sparsity; it then gets the next lower one they do."""

    sparsity: float | None = Field(
        default=None, ge=0, lt=1, description="share of channel pairs without a connection; none: 0.5, or by degree"
    )
    degree: int | None = Field(
        default=None, gt=0, description="connections of each channel of a layer's narrow side, instead of sparsity"
    )
    activation: Literal["auto", "relu", "tanh"] = Field(
        default="auto", description="auto: relu (mirrored matrices) for ReLU-like activations, else tanh (plain ones)"
    )

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.sparsity is not None and self.degree is not None:
            raise ValueError("sparsity and degree both say how sparse; leave one out")
        return self


class DistillSettings(Value):
    """Knowledge distillation from the dense model: loss = (1-alpha) CE + alpha T^2 KL(teacher_T, student_T)."""

    alpha: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field(
        default="auto",
        description="auto: 0.9 in `compress` where the dense model is a good teacher for the data, else 0",
    )
    temperature: float = Field(default=4.0, gt=0)

    @property
    def share(self) -> float:
        """Alpha as a number; what is still to be decided counts as none."""
        return 0.0 if self.alpha == "auto" else self.alpha


class OriginalSchedule(Value):
    """The schedule that the base was trained with: what rewind replays, and whose peak slr, clr and allr start from."""

    lr: float = Field(gt=0, description="its peak")
    epochs: int = Field(gt=0)
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[float, ...] = Field(default=(0.5, 0.75), description="step: shares of its epochs")
    gamma: float = Field(default=0.1, gt=0, lt=1)
    min_lr: float = Field(default=0.0, ge=0)


class FinetuneSettings(Value):
    """The fine-tuning loop."""

    epochs: int | None = Field(default=None, ge=0, description="none: 10 where there is data, else 0")
    lr: Literal["auto"] | float = "auto"
    min_lr: float | None = Field(
        default=None,
        ge=0,
        description="the schedule's last rate; none: the recommendation's (1e-4 up to 64 px, else 1e-5)",
    )
    optimizer: Literal["sgd", "adamw"] | None = Field(
        default=None, description="none: sgd for nets with BatchNorm, else adamw"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0)
    decay_norms: bool = Field(
        default=False, description="decay biases and norm scales too, as the papers' plain SGD does; timm exempts them"
    )
    schedule: Literal["step", "cosine", "constant", "rewind", "slr", "clr", "allr"] = Field(
        default="cosine",
        description="rewind: the end of the base's own; slr, clr: a climb to the base's peak, then steps or a cosine; "
        "allr: a climb to a peak by how much of the weights was cut, then linear to 0",
    )
    original: OriginalSchedule | None = Field(
        default=None, description="how the base was trained: for lr: auto (its peak) and rewind, slr, clr, allr"
    )
    milestones: tuple[float, ...] = Field(
        default=(0.5, 0.75), description="step: where LR drops, as shares of the epochs"
    )
    gamma: float = Field(default=0.1, gt=0, lt=1, description="step: the factor of each drop")
    warmup_epochs: float = Field(default=0.0, ge=0)
    amp: Literal["auto", "off", "bf16"] = Field(
        default="auto", description="auto: bf16 on a GPU that has it, off on CPU"
    )
    channels_last: Literal["auto", "on", "off"] = "auto"
    clip_grad: float | None = Field(default=None, gt=0, description="largest gradient norm")
    ema: float | None = Field(
        default=None, gt=0, lt=1, description="decay of the weight average; evaluated and exported where set"
    )
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    distill: DistillSettings = DistillSettings()
    loss: Loss = Field(
        default="ce",
        description="cskd, pskd, dlb: the net learns from itself too, from its answers to another image of the class, "
        "of the epoch before, or to another view one step before; cskd and dlb look at two images for one",
    )
    loss_weight: float | None = Field(
        default=None, gt=0, description="of that part; none: 1, with pskd 0.8 (the share it reaches in the last epoch)"
    )
    loss_temperature: float | None = Field(default=None, gt=0, description="cskd, dlb; none: 4 and 3")
    regulariser: Literal["none", "kernorth", "orthconv"] = Field(
        default="none", description="orthogonality of the weights, added to the loss in all of fine-tuning"
    )
    regulariser_weight: float = Field(default=0.1, gt=0)
    export: Literal["last", "best"] = Field(default="last", description="which epoch is exported; both are reported")
    checkpoint_every: int | None = Field(
        default=None, gt=0, description="also save every N steps; an epoch's end always saves"
    )

    @field_validator("lr")
    @classmethod
    def _positive(cls, value: str | float) -> str | float:
        if isinstance(value, float) and value <= 0:
            raise ValueError("must be above zero")
        return value

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if self.loss == "ce":
            if self.loss_weight is not None or self.loss_temperature is not None:
                raise ValueError("loss_weight and loss_temperature are of the losses cskd, pskd and dlb; loss is ce")
            return self
        if self.distill.share:
            raise ValueError(
                f"distill learns from the dense model, loss {self.loss} from the net itself; leave one out"
            )
        if self.mixup or self.cutmix:
            raise ValueError(f"loss {self.loss} needs images as they are; leave mixup and cutmix out")
        if self.loss == "pskd":
            if self.label_smoothing:
                raise ValueError("loss pskd softens the targets itself; leave label_smoothing out")
            if self.loss_temperature is not None:
                raise ValueError("loss pskd has no temperature; leave loss_temperature out")
            if self.loss_weight is not None and self.loss_weight > 1:
                raise ValueError("the loss_weight of pskd is a share, at most 1")
        return self

    @model_validator(mode="after")
    def _schedule_knows_its_rates(self) -> Self:
        if self.schedule not in RETRAINING:
            if self.original is not None and self.lr != "auto":
                raise ValueError(
                    f"original is read by lr: auto and by {', '.join(RETRAINING)}; here schedule is {self.schedule} "
                    f"and lr is {self.lr:g}"
                )
            return self
        if self.original is None and (self.lr == "auto" or self.schedule == "rewind"):
            raise ValueError(f"schedule {self.schedule} needs original, the schedule that the base was trained with")
        if self.lr != "auto" and self.schedule in {"rewind", "allr"}:
            raise ValueError(f"schedule {self.schedule} says its own rates; leave lr at auto")
        if self.warmup_epochs or self.min_lr is not None:
            raise ValueError(f"schedule {self.schedule} has its own start and end; leave out warmup_epochs and min_lr")
        if (
            self.schedule == "rewind"
            and self.original
            and self.epochs is not None
            and self.epochs > self.original.epochs
        ):
            raise ValueError(f"schedule rewind cannot replay {self.epochs} of {self.original.epochs} epochs")
        return self


class SpectrumSettings(Value):
    """The Jacobian spectrum of the report, eval mode."""

    samples: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        default="auto", description="images; auto: up to 16, fewer where they would cost more than a minute; 0 is off"
    )
    method: Literal["auto", "exact", "lanczos"] = Field(
        default="auto", description="lanczos: a few products instead of whole Jacobians; auto: where those cost minutes"
    )
    steps: int = Field(default=30, gt=1, description="lanczos: products with the Jacobian an image")
    chunk: int = Field(default=32, gt=0, description="rows of all Jacobians computed at once")
