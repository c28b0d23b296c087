"""Recipe keys of earlier versions, and where they went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

MOVED: Final[Mapping[str, str]] = {
    "recover.lstsq_images": "data.calibration_images",
    "phase.lr": "method.lr",
    "phase.momentum": "method.momentum",
    "phase.penalty": "method.penalty",
    "phase.reg_step": "method.reg_step",
    "phase.reg_every": "method.reg_every",
    "phase.reg_ceiling": "method.reg_ceiling",
    "phase.steps": "method.steps",
    "phase.stabilise": "method.stabilise",
    "phase.zero_every": "method.zero_every",
    "phase.gram_weight": "method.gram_weight",
    "phase.bn_term": "method.bn_term",
    "phase.variant": "method.variant",
    "phase.pick_step": "method.pick_step",
    "phase.pick_ceiling": "method.pick_ceiling",
    "phase.regulariser_weight": "method.weight",
    "phase.gate_l1": "method.gate_l1",
    "phase": "method",
    "epsd.steps": "method.steps",
    "epsd.lr": "method.lr",
    "epsd": "method",
    "sao.sparsity": "init.sparsity",
    "sao.degree": "init.degree",
    "sao.activation": "init.activation",
    "sao": "init",
    "finetune.min_lr": "finetune.schedule.min_lr",
    "finetune.milestones": "finetune.schedule.milestones",
    "finetune.gamma": "finetune.schedule.gamma",
    "finetune.warmup_epochs": "finetune.schedule.warmup_epochs",
    "finetune.mixup": "finetune.loss.mixup",
    "finetune.cutmix": "finetune.loss.cutmix",
    "finetune.label_smoothing": "finetune.loss.label_smoothing",
    "finetune.loss_weight": "finetune.loss.weight",
    "finetune.loss_temperature": "finetune.loss.temperature",
    "finetune.regulariser_weight": "finetune.regulariser.weight",
}
"""Old key to new key; a section that is gone stands behind its keys."""


def without_moved_keys(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe's keys without those of earlier versions, and a sentence for each of these."""
    kept, sentences = dict(values), []
    for old, new in MOVED.items():
        section, _, key = old.rpartition(".")
        holder = kept.get(section) if section else kept
        if not isinstance(holder, Mapping) or (key not in holder):
            continue
        sentences.append(f"{old} is now {new}")
        rest = {name: value for name, value in holder.items() if name != key}
        if not section:
            kept = rest
        elif rest or section not in MOVED:
            kept[section] = rest
        else:
            del kept[section]
    return kept, sentences
