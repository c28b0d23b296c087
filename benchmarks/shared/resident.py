"""Training with the whole set on the device: several networks side by side, each on a CUDA stream of its own.

A step of a small network is hundreds of small kernels that neither fill a large card nor are launched fast enough by
Python. So the step (forward, backward, SGD) is captured once as a CUDA graph, and the graphs of several networks are
replayed in turn on their own streams, where the card overlaps them. Augmentation runs on the device, an epoch at a
time. On a CPU the same code takes the same steps one after the other; a test holds them to ``train.finetune``: equal
batches (``data.CropFlip`` and ``data.epoch_order``), equal rates, equal arithmetic.

Plain SGD with momentum and weight decay on all parameters, as in the papers; on a GPU in bfloat16 autocast and
channels last, as the tool itself chooses there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.shared.papers import Split
from prunecli.data.images import epoch_order
from prunecli.data.transforms import CropFlip
from prunecli.files import read_tensors, write_tensors
from prunecli.models.build import InputSpec
from prunecli.recipe.settings import FinetuneSettings
from prunecli.training.checkpoint import prefixed, unprefixed
from prunecli.training.schedule import build_schedule
from prunecli.training.step import wants_bf16

_CHUNK = 10_000  # images augmented at once


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a network is trained."""

    settings: FinetuneSettings
    lr: float
    epochs: int
    batch_size: int
    seed: int


class Resident:
    """One network in training. ``step_`` only queues work; ``wait``, ``top1`` and ``save`` wait for it."""

    def __init__(self, model: nn.Module, course: Course, train: Split, test: Split, spec: InputSpec) -> None:
        """``train`` and ``test`` are on the device already, and shared by all networks there."""
        assert course.settings.decay_norms
        assert not course.settings.nesterov
        self.device = train.images.device
        self.layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.layout)
        self.course, self.train, self.test, self.spec = course, train, test, spec
        self.steps_per_epoch = -(-len(train.labels) // course.batch_size)
        self.epoch, self.step = 0, 0
        self.hits: list[Tensor] = []
        self.schedule = build_schedule(
            course.settings, lr=course.lr, steps_per_epoch=self.steps_per_epoch, epochs=course.epochs
        )
        self.params = list(self.model.parameters())
        self.momenta = [torch.zeros_like(parameter) for parameter in self.params]
        self.rate = torch.zeros((), device=self.device)
        self.images = torch.empty_like(train.images, memory_format=self.layout)
        self.labels = torch.empty_like(train.labels)
        self.bf16 = wants_bf16(course.settings, self.device)
        cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if cuda else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch = train.images[: course.batch_size].clone(memory_format=self.layout)
        self.targets = train.labels[: course.batch_size].clone()

    @property
    def done(self) -> bool:
        return self.epoch == self.course.epochs

    def step_(self) -> None:
        """Queue one optimiser step, and behind the last of an epoch its evaluation."""
        with self._own_stream():
            if self.step == 0:
                self._shuffle_()
            rate = self.schedule(self.epoch * self.steps_per_epoch + self.step)
            self.rate.fill_(rate)
            rows = slice(self.step * self.course.batch_size, (self.step + 1) * self.course.batch_size)
            images, labels = self.images[rows], self.labels[rows]
            if self.graph is not None and len(labels) == len(self.targets):
                self.batch.copy_(images)
                self.targets.copy_(labels)
                self.graph.replay()
            else:
                self._learn_(images, labels)
            self.step += 1
            if self.step == self.steps_per_epoch:
                self.hits.append(self._correct())
                self.epoch, self.step = self.epoch + 1, 0

    def capture(self) -> None:
        """Record the step as a CUDA graph; weights, statistics and momenta are left as they were."""
        if self.stream is None:
            return
        torch.cuda.synchronize(self.device)
        kept = [tensor.detach().clone() for tensor in self._tensors()]
        with self._own_stream():
            self.model.train()
            for _ in range(3):  # cuDNN chooses its kernels, autograd its buffers
                self._learn_(self.batch, self.targets)
        torch.cuda.synchronize(self.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._learn_(self.batch, self.targets)
        with self._own_stream(), torch.no_grad():
            for tensor, before in zip(self._tensors(), kept, strict=True):
                tensor.copy_(before)
        torch.cuda.synchronize(self.device)

    def wait(self) -> None:
        """Until all that was queued is done: before anybody reads weights."""
        if self.stream is not None:
            self.stream.synchronize()

    def top1(self) -> list[float]:
        """Test accuracy in percent after each epoch so far."""
        self.wait()
        return [100 * int(hits) / len(self.test.labels) for hits in self.hits]

    def _tensors(self) -> list[Tensor]:
        return [*self.params, *self.model.buffers(), *self.momenta]

    def _own_stream(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext()

    def _shuffle_(self) -> None:
        """The epoch's images, augmented and in the epoch's order."""
        count = len(self.train.labels)
        order = epoch_order(count, seed=self.course.seed, epoch=self.epoch)
        vary = CropFlip(self.spec, count=count, seed=self.course.seed, epoch=self.epoch)
        at = order.to(self.device)
        torch.index_select(self.train.labels, 0, at, out=self.labels)
        for start in range(0, count, _CHUNK):
            part = slice(start, start + _CHUNK)
            self.images[part] = vary(self.train.images[at[part]], order[part])
        self.model.train()

    def _learn_(self, images: Tensor, labels: Tensor) -> None:
        """SGD: momentum * v + gradient + decay * w is the new v, and rate * v leaves w."""
        # the cache of casts would keep tensors of one step alive in the next, which a graph cannot hold
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            logits = self.model(images)
        loss = functional.cross_entropy(logits.float(), labels)
        gradients = list(torch.autograd.grad(loss, self.params))
        with torch.no_grad():
            torch._foreach_add_(gradients, self.params, alpha=self.course.settings.weight_decay)
            torch._foreach_mul_(self.momenta, self.course.settings.momentum)
            torch._foreach_add_(self.momenta, gradients)
            steps = torch._foreach_mul(self.momenta, self.rate)  # noqa: SLF001 - as torch's own optimisers do
            torch._foreach_sub_(self.params, steps)

    @torch.no_grad()
    def _correct(self) -> Tensor:
        """Test images that are classified rightly, in float32, as the tool evaluates."""
        self.model.eval()
        parts = zip(self.test.images.split(2000), self.test.labels.split(2000), strict=True)
        return torch.stack([(self.model(x).argmax(1) == y).sum() for x, y in parts]).sum()

    # ------------------------------------------------------------------------------------------ resuming

    def save(self, path: Path, notes: Mapping[str, Any]) -> None:
        """Keep the position at the end of an epoch, with whatever the caller wants to find again."""
        assert self.step == 0
        self.wait()
        tensors = prefixed("model", self.model.state_dict())
        tensors |= {f"momentum.{place}": tensor for place, tensor in enumerate(self.momenta)}
        position = {"epoch": self.epoch, "hits": [int(hits) for hits in self.hits], "notes": dict(notes)}
        write_tensors(path, tensors, {"position": json.dumps(position)})

    def resume(self, path: Path) -> dict[str, Any] | None:
        """Go on where ``save`` left the run; the caller's notes, or None where there is nothing."""
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            position = json.loads(file.metadata()["position"])
        tensors = read_tensors(path)
        self.model.load_state_dict(unprefixed("model", tensors))
        for place, tensor in enumerate(self.momenta):
            tensor.copy_(tensors[f"momentum.{place}"])
        self.epoch = position["epoch"]
        self.hits = [torch.tensor(hits) for hits in position["hits"]]
        notes: dict[str, Any] = position["notes"]
        return notes
