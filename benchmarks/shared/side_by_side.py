"""Many copies of one small net trained in one process: a parameter is one stacked tensor, a step is one step for all.

Small nets leave a processor idle between operators; side by side they fill it. Each run is what ``train.finetune``
would have made of the same start, seed and settings (plain SGD on all parameters, cross-entropy, no augmentation), up
to the order in which sums round: the same batches in the same order, the same learning rate at each step. A test
holds the two together.

Runs are grouped by seed: the runs of a group read the same batches. Shapes: images ``[G, B, C, H, W]`` (a batch for
each of G groups), stacked parameters ``[R, ...]`` with R = G * A, run ``g * A + a`` being arm ``a`` of group ``g``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from benchmarks.shared.papers import Split
from prunecli.data.images import epoch_order
from prunecli.files import read_tensors, write_tensors
from prunecli.recipe.settings import FinetuneSettings
from prunecli.training.schedule import build_schedule

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One column of runs: where each seed's run starts, and the schedule of all of them."""

    starts: Sequence[State]
    lr: float
    settings: FinetuneSettings

    def rates(self, epochs: int, steps_per_epoch: int) -> Tensor:
        """The learning rate of every step ``[epochs * steps_per_epoch]``, from the tool's own schedule."""
        schedule = build_schedule(self.settings, lr=self.lr, steps_per_epoch=steps_per_epoch, epochs=epochs)
        return torch.tensor([schedule(step) for step in range(epochs * steps_per_epoch)])


def stacked_logits(net: nn.Module, params: State, images: Tensor) -> Tensor:
    """Logits ``[R, B, K]`` of R stacked nets on ``images`` ``[G, B, C, H, W]``."""
    groups = len(images)
    layers = [module for module in net.modules() if not list(module.children())]
    if all(isinstance(layer, nn.Linear | nn.ReLU | nn.Identity) for layer in layers):
        return _perceptron_logits(layers, list(params.values()), images.flatten(2))
    grouped = {name: tensor.unflatten(0, (groups, -1)) for name, tensor in params.items()}
    one = vmap(lambda state, x: functional_call(net, state, (x,)), in_dims=(0, None))
    return vmap(one)(grouped, images).flatten(0, 1)


def _perceptron_logits(layers: Sequence[nn.Module], tensors: Sequence[Tensor], x: Tensor) -> Tensor:
    """The same for a chain of linear layers: the arms of a group are one wide first layer, the rest is ``baddbmm``.

    vmap would copy the images once for each arm, which is most of the work where the net is narrow.
    """
    runs = len(tensors[0])
    pairs = iter(zip(tensors[::2], tensors[1::2], strict=True))
    hidden: Tensor | None = None
    for layer in layers:
        if isinstance(layer, nn.Linear):
            weight, bias = next(pairs)  # [R, out, in], [R, out]
            if hidden is None:  # weights first: their gradient is then a product without a copy
                wide = torch.bmm(weight.reshape(len(x), -1, weight.shape[-1]), x.mT)  # [G, A * out, B]
                hidden = wide.reshape(runs, -1, x.shape[1]).mT + bias[:, None]
            else:
                hidden = torch.baddbmm(bias[:, None], hidden, weight.mT)
        elif isinstance(layer, nn.ReLU):
            assert hidden is not None
            hidden = hidden.relu()
    assert hidden is not None
    return hidden


class SideBySide:
    """The runs of all ``arms`` for all ``seeds``; ``train_epoch`` takes every one of them an epoch further."""

    def __init__(
        self,
        net: nn.Module,
        arms: Sequence[Arm],
        train: Split,
        *,
        seeds: Sequence[int],
        epochs: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        """All arms share momentum and weight decay; the nets have no buffers (no BatchNorm), and no dropout."""
        assert not list(net.buffers())
        assert all(arm.settings.decay_norms and not arm.settings.nesterov for arm in arms)
        (self.momentum, self.decay), *others = {(arm.settings.momentum, arm.settings.weight_decay) for arm in arms}
        assert not others
        self.net, self.train, self.seeds, self.device = net, train.to(device), tuple(seeds), device
        self.epochs, self.batch_size, self.epoch = epochs, batch_size, 0
        self.steps_per_epoch = -(-len(train.labels) // batch_size)
        starts = [arm.starts[place] for place in range(len(seeds)) for arm in arms]
        names = [name for name, _ in net.named_parameters()]
        self.params = {name: torch.stack([start[name] for start in starts]).to(device) for name in names}
        self.momenta = {name: torch.zeros_like(tensor) for name, tensor in self.params.items()}
        self.rates = torch.stack([arm.rates(epochs, self.steps_per_epoch) for arm in arms]).to(device)

    def train_epoch(self) -> None:
        """One epoch of every run."""
        count = len(self.train.labels)
        order = torch.stack([epoch_order(count, seed=seed, epoch=self.epoch) for seed in self.seeds]).to(self.device)
        first = self.epoch * self.steps_per_epoch
        for step, rows in enumerate(order.split(self.batch_size, dim=1)):
            images = self.train.images.index_select(0, rows.flatten()).unflatten(0, rows.shape)
            self._step_(images, self.train.labels[rows], self.rates[:, first + step])
        self.epoch += 1

    def _step_(self, images: Tensor, labels: Tensor, rates: Tensor) -> None:
        """SGD on images ``[G, B, ...]`` and labels ``[G, B]`` with a rate for each arm ``[A]``.

        The losses of all runs are summed, so that each run's gradient is that of its own mean loss.
        """
        tensors, momenta = list(self.params.values()), list(self.momenta.values())
        for tensor in tensors:
            tensor.requires_grad_()
        logits = stacked_logits(self.net, self.params, images)
        targets = labels.repeat_interleave(len(rates), dim=0).flatten()
        loss = functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / labels.shape[1]
        gradients = list(torch.autograd.grad(loss, tensors))
        with torch.no_grad():
            torch._foreach_add_(gradients, tensors, alpha=self.decay)
            torch._foreach_mul_(momenta, self.momentum)
            torch._foreach_add_(momenta, gradients)
            each = rates.repeat(len(self.seeds))
            sizes = [each.view(-1, *[1] * (tensor.dim() - 1)) for tensor in tensors]
            torch._foreach_addcmul_(tensors, momenta, sizes, value=-1)

    @torch.no_grad()
    def top1(self, split: Split, *, chunk: int = 1000) -> list[float]:
        """Accuracy of every run in percent."""
        held = split.to(self.device)
        hits = torch.zeros(len(next(iter(self.params.values()))), dtype=torch.int64, device=self.device)
        for images, labels in zip(held.images.split(chunk), held.labels.split(chunk), strict=True):
            hits += (stacked_logits(self.net, self.params, images[None]).argmax(-1) == labels).sum(1)
        return (100 * hits.double() / len(held.labels)).tolist()

    def state(self, run: int) -> dict[str, Tensor]:
        """The weights of one run, as a state_dict of the net."""
        return {name: tensor[run].detach().clone() for name, tensor in self.params.items()}

    # ------------------------------------------------------------------------------------------ resuming

    def save(self, path: Path, job: Mapping[str, Any]) -> None:
        """Keep the position; ``job`` says which runs these are and what was measured so far."""
        tensors = {f"param.{name}": tensor for name, tensor in self.params.items()}
        tensors |= {f"momentum.{name}": tensor for name, tensor in self.momenta.items()}
        write_tensors(path, tensors, {"job": json.dumps({**job, "epoch": self.epoch})})

    def resume(self, path: Path, *, runs: Sequence[str]) -> dict[str, Any] | None:
        """Go on where ``save`` left these very runs; what it was told then, or None where there is nothing."""
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            job: dict[str, Any] = json.loads(file.metadata()["job"])
        if job["runs"] != list(runs):
            return None
        tensors = read_tensors(path)
        for name in self.params:
            self.params[name] = tensors[f"param.{name}"].to(self.device)
            self.momenta[name] = tensors[f"momentum.{name}"].to(self.device)
        self.epoch = job["epoch"]
        return job
