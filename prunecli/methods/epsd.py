"""EPSD's score for whole channels: how much each channel is worth to a training that is about to begin.

EPSD (Chen et al., AAAI 2024, arXiv 2402.00084; no code released) prunes before training: it scores by how masking
changes a *self-distillation* loss after a few training steps, so that what is left is easy to distil. The score is that
of ProsPr (Alizadeh et al., ICLR 2022, arXiv 2202.08132) with that loss in the place of cross-entropy. With masks c on
the starting weights ``W_0(c)``, plain SGD steps ``W_{i+1} = W_i - lr dL_i(W_i)/dW`` on a batch each and one batch more,

    score = |dL_M(W_M) / dc| at c = 1,

differentiated through all steps. The papers mask single weights; here c has one entry for each channel of a coupled
group, and it scales what reads the channel, so that c_j = 0 is a net that starts without channel j.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunecli.errors import PruneError, UnsupportedError, one_line
from prunecli.methods.gates import gate_places, gated_weights
from prunecli.randomness import own_randomness
from prunecli.recipe.methods import EpsdMethod
from prunecli.recipe.settings import DistillSettings, FinetuneSettings
from prunecli.training.objective import Net, Objective, build_objective
from prunecli.training.step import TrainingImages
from prunecli.values.groups import Group


def epsd_scores(
    model: nn.Module,
    groups: Sequence[Group],
    images: TrainingImages,
    settings: EpsdMethod,
    finetune: FinetuneSettings,
    *,
    device: torch.device,
    seed: int,
) -> dict[str, Tensor]:
    """EPSD scores of channels ``[width]``, float64 on the CPU, by group name.

    Normalisation runs in training mode. Mixing of images is left out: the steps are too few for it. Takes the memory of
    ``steps + 1`` training steps at once and the time of about three times as many.

    Args:
        model: the net with the starting weights; it is not changed.
        groups: the groups whose channels are scored.
        images: training images, of which ``steps + 1`` batches are read.
        settings: number and learning rate of the steps.
        finetune: settings of the fine-tuning, for its loss.
        device: the device to compute on.
        seed: seed of dropout and other random layers.

    Raises:
        UnsupportedError: the model has an operation that cannot be differentiated twice.
        PruneError: the steps diverge.
    """
    if not groups:
        return {}
    net = copy.deepcopy(model).to(device).train()
    places = [(name, dim, numbers.to(device)) for name, dim, numbers in gate_places(net, groups)]
    masks = torch.ones(sum(group.width for group in groups), device=device, requires_grad=True)
    given = dict(net.named_parameters())
    weights = given | gated_weights(given, places, masks)
    asked = finetune.loss
    unmixed = asked.updated(mixup=0.0, cutmix=0.0) if asked.kind == "ce" else asked
    plain = finetune.updated(loss=unmixed, distill=DistillSettings())
    objective = build_objective(plain, num_classes=images.num_classes, epochs=settings.steps + 1)
    batches = _batches(images, objective, device)
    moved = copy.deepcopy(net)  # the net after each step, as a module: the objective keeps the last one as a teacher
    with own_randomness(device), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        torch.manual_seed(seed)
        try:
            for _ in range(settings.steps):
                weights = _step(net, objective, weights, next(batches), lr=settings.lr)
                moved.load_state_dict(dict(net.named_buffers()) | weights, strict=False)
                objective.end_epoch_(moved)  # so few steps that each is an epoch: PS-KD has something to learn from
            loss = objective.loss(_with(net, weights), *next(batches))
            (gradient,) = torch.autograd.grad(loss, [masks], materialize_grads=True)
        except (RuntimeError, NotImplementedError) as error:
            if not any(word in str(error) for word in ("derivative", "differentiate", "double backward")):
                raise
            raise UnsupportedError(
                f"Method epsd differentiates training steps, which this model does not allow: {one_line(error)}.",
                hint="Use another method, for example --method oneshot.",
            ) from error
    if not bool(gradient.isfinite().all()):
        raise PruneError(
            f"Method epsd's {settings.steps} steps at learning rate {settings.lr:g} diverge.", hint="Lower method.lr."
        )
    parts = gradient.abs().cpu().double().split([group.width for group in groups])
    return {group.name: part for group, part in zip(groups, parts, strict=True)}


def _step(
    net: nn.Module, objective: Objective, weights: Mapping[str, Tensor], batch: tuple[Tensor, Tensor], *, lr: float
) -> dict[str, Tensor]:
    """The weights after one plain SGD step, by name, as a differentiable function of those before it."""
    loss = objective.loss(_with(net, weights), *batch)
    learning = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    trained = {name: tensor for name, tensor in weights.items() if name in learning}
    gradients = torch.autograd.grad(loss, list(trained.values()), create_graph=True, materialize_grads=True)
    moved = {name: tensor - lr * step for (name, tensor), step in zip(trained.items(), gradients, strict=True)}
    return {**weights, **moved}


def _with(net: nn.Module, weights: Mapping[str, Tensor]) -> Net:
    """The net with these weights; running statistics are updated in ``net`` itself."""
    return lambda images: functional_call(net, dict(weights), (images,))


def _batches(images: TrainingImages, objective: Objective, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in itertools.count():
        for inputs, labels in images.train_loader(epoch=epoch, companion=objective.companion):
            yield inputs.to(device), labels.to(device)
