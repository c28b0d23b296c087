"""What each channel is worth to a training that is about to begin: EPSD's score, for whole channels.

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

from prunecli.errors import PruneError, UnsupportedError
from prunecli.methods.gates import gate_places, gated_weights
from prunecli.randomness import own_randomness
from prunecli.recipe.settings import DistillSettings, EpsdSettings, FinetuneSettings
from prunecli.training.objective import Net, Objective, build_objective
from prunecli.training.step import TrainingImages
from prunecli.values.groups import Group


def prospect_scores(
    model: nn.Module,
    groups: Sequence[Group],
    images: TrainingImages,
    settings: EpsdSettings,
    finetune: FinetuneSettings,
    *,
    device: torch.device,
    seed: int,
) -> dict[str, Tensor]:
    """Scores ``[width]``, float64 on the CPU, by group name; ``model`` is left as it is.

    Normalisation runs in training mode. Mixing of images is left out, the steps are too few for it. Takes the memory of
    ``steps + 1`` training steps at once and time of about three times as many.

    Args:
        model: the starting weights.
        groups: whose channels are scored.
        images: ``steps + 1`` training batches are read.
        settings: number and size of the steps.
        finetune: ``loss`` and what belongs to it.
        device: where to compute.
        seed: of dropout and the like.

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
    plain = finetune.model_copy(update={"mixup": 0.0, "cutmix": 0.0, "distill": DistillSettings()})
    objective = build_objective(plain, num_classes=images.num_classes, epochs=settings.steps + 1)
    batches = _batches(images, objective, device)
    moved = copy.deepcopy(net)  # stands for the net behind each step
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
            reason = str(error).splitlines()[0].rstrip(".")
            raise UnsupportedError(
                f"Method epsd differentiates training steps, which this model does not allow: {reason}.",
                hint="Use another method, for example --method oneshot.",
            ) from error
    if not bool(gradient.isfinite().all()):
        raise PruneError(
            f"Method epsd's {settings.steps} steps at learning rate {settings.lr:g} diverge.", hint="Lower epsd.lr."
        )
    parts = gradient.abs().cpu().double().split([group.width for group in groups])
    return {group.name: part for group, part in zip(groups, parts, strict=True)}


def _step(
    net: nn.Module, objective: Objective, weights: Mapping[str, Tensor], batch: tuple[Tensor, Tensor], *, lr: float
) -> dict[str, Tensor]:
    """The weights after one plain SGD step, as a function of those before it."""
    loss = objective.loss(_with(net, weights), *batch)
    learning = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    trained = {name: tensor for name, tensor in weights.items() if name in learning}
    gradients = torch.autograd.grad(loss, list(trained.values()), create_graph=True, materialize_grads=True)
    moved = {name: tensor - lr * step for (name, tensor), step in zip(trained.items(), gradients, strict=True)}
    return {**weights, **moved}


def _with(net: nn.Module, weights: Mapping[str, Tensor]) -> Net:
    """The net with these weights; its own running statistics go on."""
    return lambda images: functional_call(net, dict(weights), (images,))


def _batches(images: TrainingImages, objective: Objective, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in itertools.count():
        for inputs, labels in images.train_loader(epoch=epoch, companion=objective.companion):
            yield inputs.to(device), labels.to(device)
