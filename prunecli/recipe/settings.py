"""The sections of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from prunecli.recipe.losses import CeLoss, Loss, NoRegulariser, Regulariser
from prunecli.recipe.schedules import RETRAINING, CosineSchedule, OriginalSchedule, RetrainingSchedule, Schedule
from prunecli.values.value import Value

Criterion = Literal["auto", "l1", "l2", "group_norm", "bn_scale", "lamp", "fpgm", "taylor", "varw", "forward", "random"]
Ranking = Literal["auto", "local", "global", "isomorphic", "loss"]
DATA_DRIVEN: Final = frozenset({"varw", "forward"})  # criteria that look at what layers read
Count = Annotated[int, Field(gt=0)]
RecoverStep = Literal["auto", "lstsq", "onepass", "repair", "orthp", "blend", "bn", "blocks"]


class DataSettings(Value):
    """Where images come from. ``name`` is an ImageFolder path, a timm dataset name, or ``digits``."""

    name: str | None = Field(default=None, description="an ImageFolder, a timm data set, or digits")
    dir: str | None = Field(default=None, description="folder where a named data set lies")
    calibration: str | None = Field(
        default=None,
        description="folder of images, at any depth, without classes or labels: what is done without labels looks at "
        "these; null: at the training images",
    )
    calibration_images: int = Field(
        default=256, gt=0, description="images without labels from which channels are chosen and layers are solved"
    )
    held_out_images: int = Field(
        default=64, gt=0, description="further images without labels, on which such choices are judged"
    )
    train_split: str = Field(default="train", description="name of the training split")
    val_split: str = Field(default="validation", description="name of the validation split")
    batch_size: int = Field(default=128, gt=0, description="images in a batch")
    workers: int = Field(default=0, ge=0, description="processes that load images; 0: none beside the main one")
    augment: Literal["auto", "timm", "crop_flip", "none"] = Field(
        default="auto",
        description="auto: none for written digits, crop_flip (pad 4, random crop, flip) up to 64 px, timm's own above",
    )
    train_limit: int | None = Field(default=None, gt=0, description="use only the first N training images")
    val_limit: int | None = Field(default=None, gt=0, description="use only the first N validation images")
    unreadable_limit: int = Field(default=10, ge=0, description="how many unreadable images a run survives")
    input_size: tuple[Count, Count, Count] | None = Field(
        default=None, description="channels, height, width that the model is fed with; null: the checkpoint's own"
    )
    mean: tuple[float, ...] | None = Field(
        default=None, min_length=1, description="mean of each channel, for pixels in [0, 1]; null: the checkpoint's own"
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        default=None, min_length=1, description="standard deviation of each channel; null: the checkpoint's own"
    )

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is set of ``input_size``, ``mean`` and ``std``, as JSON values: it goes before the checkpoint's own."""
        given = {"input_size": self.input_size, "mean": self.mean, "std": self.std}
        return {key: list(value) for key, value in given.items() if value is not None}


class PruneSettings(Value):
    """What may be cut, and how channels are ranked."""

    criterion: Criterion = Field(
        default="auto", description="score by which channels are ranked; auto: forward with images, l1 without"
    )
    ranking: Ranking = Field(
        default="auto",
        description="which channels compete: those of a group, all, or those of groups alike; loss: widths by what "
        "each costs the answers; auto: loss with images, local without or for another criterion",
    )
    graph: Literal["axes", "torch_pruning"] = Field(default="axes", description="engine that finds coupled channels")
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
    min_width: int = Field(default=1, gt=0, description="fewest channels that a group keeps")
    max_ratio: float = Field(default=0.995, gt=0, lt=1, description="largest share of one group that may leave")
    calibration_images: int = Field(default=128, gt=0, description="images for criteria that need gradients")

    def decided(self, *, by_data: bool) -> PruneSettings:
        """The settings with a criterion and a ranking in the place of ``auto``.

        Args:
            by_data: whether what layers read may decide: there are images, and the method leaves the choice open.
        """
        criterion, ranking = self.criterion, self.ranking
        if criterion == "auto":
            criterion = "forward" if by_data else "l1"
        if ranking == "auto":
            ranking = "loss" if by_data and self.criterion in {"auto", *DATA_DRIVEN} else "local"
        return self.updated(criterion=criterion, ranking=ranking)


class RecoverSettings(Value):
    """Recovery after the cut. ``steps: [auto]`` tries what fits and keeps what the stated rule says helps."""

    steps: tuple[RecoverStep, ...] = Field(
        default=("auto",), description="auto alone, or steps applied in this order; [] switches recovery off"
    )
    ridge: float = Field(
        default=1e-3, ge=0, description="lstsq: added to the diagonal, as a share of the kept inputs' mean variance"
    )
    blend: float = Field(
        default=0.3, ge=0, le=1, description="how far blend goes: 0 nowhere, 1 to equal singular values"
    )
    orthp_method: Literal["qr", "polar", "newton_schulz", "approximate", "delta", "scratch"] = Field(
        default="qr", description="delta and scratch forget the weights; they are there for comparison"
    )
    gain: Literal["auto"] | float = Field(
        default="auto", description="orthp: singular value of the new weights; auto: by the activation"
    )
    bn_images: int = Field(default=512, gt=0, description="training images for BN re-estimation")
    block_steps: int = Field(default=100, gt=0, description="blocks: optimiser steps that a block gets on average")
    probe_steps: int = Field(default=30, ge=0, description="optimiser steps of the probe that decides what auto keeps")

    @model_validator(mode="after")
    def _steps_fit_together(self) -> Self:
        if "auto" in self.steps and len(self.steps) > 1:
            raise ValueError("auto chooses the steps itself, so it stands alone")
        if "lstsq" in self.steps[1:]:
            raise ValueError("lstsq starts from the dense weights and would undo what stands before it; put it first")
        if "onepass" in self.steps[1:] and self.steps[:2] != ("lstsq", "onepass"):
            raise ValueError(
                "onepass starts from the dense weights: put it first, or right behind lstsq to meet it half way"
            )
        return self


class DistillSettings(Value):
    """Knowledge distillation from the dense model: loss = (1-alpha) CE + alpha T^2 KL(teacher_T, student_T)."""

    alpha: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field(
        default="auto",
        description="auto: 0.9 in `compress` where the dense model is a good teacher for the data, else 0",
    )
    temperature: float = Field(default=4.0, gt=0, description="temperature of both answers")

    @property
    def share(self) -> float:
        """Alpha as a number; what is still to be decided counts as none."""
        return 0.0 if self.alpha == "auto" else self.alpha


class FinetuneSettings(Value):
    """The fine-tuning loop."""

    epochs: int | None = Field(
        default=None, ge=0, description="length of fine-tuning; null: 10 where there is data, else 0"
    )
    lr: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        default="auto", description="peak learning rate; auto: the recommended one"
    )
    optimizer: Literal["sgd", "adamw"] | None = Field(
        default=None, description="null: sgd for nets with BatchNorm, else adamw"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of SGD")
    nesterov: bool = Field(default=False, description="Nesterov's momentum")
    weight_decay: float = Field(default=5e-4, ge=0, description="weight decay of the optimiser")
    decay_norms: bool = Field(
        default=False, description="decay biases and norm scales too, as the papers' plain SGD does; timm exempts them"
    )
    schedule: Schedule = Field(
        default=CosineSchedule(),
        description="rewind: the end of the base's own; slr, clr: a climb to the base's peak, then steps or a cosine; "
        "allr: a climb to a peak by how much of the weights was cut, then linear to 0",
    )
    original: OriginalSchedule | None = Field(
        default=None, description="how the base was trained: for lr: auto (its peak) and rewind, slr, clr, allr"
    )
    amp: Literal["auto", "off", "bf16"] = Field(
        default="auto", description="auto: bf16 on a GPU that has it, off on CPU"
    )
    channels_last: Literal["auto", "on", "off"] = Field(
        default="auto", description="memory format of images and weights; auto: on for convolutional nets on a GPU"
    )
    clip_grad: float | None = Field(default=None, gt=0, description="largest gradient norm")
    ema: float | None = Field(
        default=None, gt=0, lt=1, description="decay of the weight average; evaluated and exported where set"
    )
    distill: DistillSettings = DistillSettings()
    loss: Loss = Field(
        default=CeLoss(),
        description="cskd, pskd, dlb: the net learns from itself too, from its answers to another image of the class, "
        "of the epoch before, or to another view one step before; cskd and dlb look at two images for one",
    )
    regulariser: Regulariser = Field(
        default=NoRegulariser(), description="orthogonality of the weights, added to the loss in all of fine-tuning"
    )
    export: Literal["last", "best"] = Field(default="last", description="which epoch is exported; both are reported")
    checkpoint_every: int | None = Field(
        default=None, gt=0, description="also save every N steps; an epoch's end always saves"
    )

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if self.loss.kind != "ce" and self.distill.share:
            raise ValueError(
                f"distill learns from the dense model, loss {self.loss.kind} from the net itself; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _schedule_knows_its_rates(self) -> Self:
        kind = self.schedule.kind
        if not isinstance(self.schedule, RetrainingSchedule):
            if self.original is not None and self.lr != "auto":
                raise ValueError(
                    f"original is read by lr: auto and by {', '.join(RETRAINING)}; here schedule is {kind} "
                    f"and lr is {self.lr:g}"
                )
            return self
        if self.original is None and (self.lr == "auto" or kind == "rewind"):
            raise ValueError(f"schedule {kind} needs original, the schedule that the base was trained with")
        if self.lr != "auto" and kind in {"rewind", "allr"}:
            raise ValueError(f"schedule {kind} says its own rates; leave lr at auto")
        if kind == "rewind" and self.original and self.epochs is not None and self.epochs > self.original.epochs:
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
