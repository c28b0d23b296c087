"""The fine-tuning learning rate as values: the situation it is chosen for, the rules applied, the recommendation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, model_serializer, model_validator

from prunecli.values.value import Value

OptimizerName = Literal["sgd", "adamw"]
PrescribingSchedule = Literal["rewind", "slr", "clr", "allr"]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
# The key "says" is promised by INTERFACE section 4.
Reason = Annotated[str, Field(validation_alias=AliasChoices("reason", "says"), serialization_alias="says")]


class FinetuneSituation(Value):
    """What the rules of the learning rate may look at. A field that was not given is neither written nor shown.

    Attributes:
        optimizer: the optimiser of the fine-tuning.
        epochs: the length of the fine-tuning.
        batch_size: images a step, over all processes.
        small_images: whether images are CIFAR-like (64 px or less) rather than ImageNet-like.
        removed_channels: the share of channels removed, mean over the groups that were cut (the papers' pruning ratio).
        removed_params: the share of the parameters removed.
        steps: optimiser steps of the fine-tuning; ``None`` if unknown, as without data.
        narrowest_width: channels left in the narrowest cut layer; recorded, no rule reads it yet.
        jsv_ratio: the mean Jacobian singular value now over that of the dense model; recorded, no rule reads it yet.
        lost_top1: the share of the dense model's top-1 above guessing that is gone (``measure.accuracy.lost_top1``);
            ``None`` if it was not measured, or if the dense model does not know the data.
        base_peak_lr: the highest rate the base was trained at; ``None`` if unknown (SGD: 0.1 is assumed).
        from_scratch: whether the weights are random.
        distill_share: the share of the loss that is distillation.
        distill_temperature: the temperature T of the distillation.
    """

    optimizer: OptimizerName
    epochs: int
    batch_size: Count
    small_images: bool
    removed_channels: Share
    removed_params: Share
    steps: Count | None = None
    narrowest_width: Count | None = None
    jsv_ratio: float | None = None
    lost_top1: Share | None = None
    base_peak_lr: Positive | None = None
    from_scratch: bool = False
    distill_share: Share = 0.0
    distill_temperature: Positive = 1.0


class PrescribedSchedule(Value):
    """What a schedule with a rate of its own was computed from; the last four fields are given for ALLR only.

    Attributes:
        schedule: the schedule's name.
        epochs: the length of the retraining.
        original_peak_lr: the highest rate the base was trained at.
        original_epochs: the length of the base's own training.
        norm_dense: the Euclidean norm over all parameters before the cut.
        norm_pruned: the same norm after the cut.
        norm_removed: the share of the norm that the cut took away, ``||W - W_p|| / ||W||``.
        sparsity: the share of the parameters removed.
    """

    schedule: PrescribingSchedule
    epochs: int
    original_peak_lr: float
    original_epochs: int
    norm_dense: float | None = None
    norm_pruned: float | None = None
    norm_removed: float | None = None
    sparsity: float | None = None


class Rule(Value):
    """A rule that was applied.

    Attributes:
        name: a short name.
        lr: the rate after this rule.
        reason: the rule's outcome and why, as sentences.
        source: the papers or the measurement it rests on.
    """

    name: str
    lr: float
    reason: Reason
    source: str


class Candidate(Value):
    """A rate that was weighed up against others.

    Attributes:
        name: a short name.
        lr: the rate; ``None`` where its rule does not apply.
        taken: whether it is the recommended one.
        reason: what was measured of this rate, or why its rule does not apply.
    """

    name: str
    lr: float | None
    taken: bool
    reason: Reason


class LRReport(Value):
    """The recommended learning rate of a fine-tuning, and why. As JSON it is the ``lr`` of ``report.json``.

    Attributes:
        recommended: the peak learning rate.
        rule: the reasons of all rules, as one text.
        inputs: what the rules have read.
        final_lr: the rate that the schedule should end at; ``None`` where the schedule itself prescribes it.
        rules: the applied rules, in their order.
        candidates: the rates that were weighed up; empty where the schedule prescribes its rate.
    """

    recommended: float
    rule: str
    inputs: FinetuneSituation | PrescribedSchedule
    final_lr: float | None = None
    rules: tuple[Rule, ...]
    candidates: tuple[Candidate, ...] = ()

    def measurements(self) -> dict[str, float | str | None]:
        """Name and value of each given input, then of the final rate if there is one."""
        final = {} if self.final_lr is None else {"final_lr": self.final_lr}
        # Reports of earlier versions lack some inputs. Their defaults would state what nobody measured.
        return self.inputs.model_dump(exclude_unset=True) | final

    @model_serializer
    def _to_json(self) -> dict[str, Any]:
        """The keys of INTERFACE section 4: everything but rate and rule lies flat in ``evidence``."""
        evidence: dict[str, Any] = self.measurements()
        evidence["rules"] = [rule.model_dump(by_alias=True) for rule in self.rules]
        if self.candidates:
            evidence["candidates"] = [candidate.model_dump(by_alias=True) for candidate in self.candidates]
        return {"recommended": self.recommended, "rule": self.rule, "evidence": evidence}

    @model_validator(mode="before")
    @classmethod
    def _from_json(cls, document: Any) -> Any:
        """Undo ``_to_json``; what does not have its shape is left to the fields' own checks."""
        if not isinstance(document, dict) or not isinstance(document.get("evidence"), dict):
            return document
        fields, evidence = dict(document), dict(document["evidence"])
        del fields["evidence"]
        fields |= {key: evidence.pop(key) for key in ("final_lr", "rules", "candidates") if key in evidence}
        return fields | {"inputs": evidence}
