"""The optimiser of the fine-tuning, by timm's factory: SGD or AdamW, and which parameters weight decay spares."""

from __future__ import annotations

from typing import Literal

from timm.layers import RmsNorm
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from prunecli.errors import UsageError
from prunecli.recipe.settings import FinetuneSettings


def optimizer_name(settings: FinetuneSettings, model: nn.Module) -> Literal["sgd", "adamw"]:
    """The optimiser asked for; else SGD for nets with BatchNorm or no norm at all, AdamW for those that have only
    LayerNorm or RMSNorm, as their authors trained them.
    """
    if settings.optimizer is not None:
        return settings.optimizer
    modules = list(model.modules())
    if any(isinstance(module, _BatchNorm) for module in modules):
        return "sgd"
    return "adamw" if any(isinstance(module, nn.LayerNorm | nn.RMSNorm | RmsNorm) for module in modules) else "sgd"


def build_optimizer(model: nn.Module, settings: FinetuneSettings, *, lr: float) -> Optimizer:
    """SGD or AdamW over the trainable parameters, by timm's factory.

    Weight decay follows timm's default: none on tensors with one axis (biases, norm scales) nor on what the model
    itself exempts (``no_weight_decay``). With ``decay_norms`` it is on all parameters, as in the papers' SGD.

    Raises:
        UsageError: Nesterov without momentum.
    """
    name: str = optimizer_name(settings, model)
    if name == "sgd":
        if settings.nesterov and settings.momentum == 0:
            raise UsageError("finetune.nesterov needs finetune.momentum above 0.")
        name = "sgd" if settings.nesterov else "momentum"  # timm's "sgd" is the Nesterov one
    optimizer: Optimizer = create_optimizer_v2(
        model,
        name,
        lr=lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        filter_bias_and_bn=not settings.decay_norms,
    )
    return optimizer
