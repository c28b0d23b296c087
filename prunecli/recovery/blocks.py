"""Block-wise reconstruction: each block of the pruned net learns, without labels, to return what the dense one returns.

Blocks come one after the other (``find_blocks``). With ``s`` what the pruned block returns, given what the pruned
blocks before it returned, and ``d_P`` the kept part of what the dense block returns in the dense net, the loss is

    ``mean |s - d_P|^2 / var(d_P)``,

and for the last block the KL divergence from the dense net's answers in nats. Adam, a cosine to zero, batches of 32
images and their mirror images; the statistics of BatchNorm stay, its scale and shift learn. An eighth of the images is
held out. The error on these decides, block by block: a block that did not get better keeps the weights that it had.

* The rate is found: the first blocks that are trained are trained at three rates each, and the rate that lowered their
  errors most goes on.
* Steps go where the error is: in proportion to the blocks' errors before any training, within bounds. A block whose
  error is below a thousandth of the variance is left alone.

Sources: "BRECQ" (Li et al. 2021, arXiv 2102.05426) for the block as the unit and for the kept outputs of the dense
block as its target, there for quantisation. Figures: ``benchmarks/README.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from prunecli.data.transforms import BLOCKS, generator
from prunecli.measure.segments import Segments
from prunecli.models.layers import evaluation_mode
from prunecli.models.tensors import clear_caches_
from prunecli.randomness import own_randomness
from prunecli.recovery.find_blocks import Block, find_blocks
from prunecli.values.plan import Plan

RATES: Final = (5e-4, 1.5e-3, 4e-3)  # of Adam
_TRIALS: Final = 2  # blocks that are trained at every rate
_BATCH: Final = 32  # images in an optimiser step
_PASS: Final = 64  # images in a forward pass without gradients
_HELD_OUT: Final = 8  # one image of so many
_NEGLIGIBLE: Final = 1e-3  # error of a block, as a share of the variance, below which it is not trained
_MOST: Final = 3.0  # largest and
_LEAST: Final = 0.25  # smallest number of steps of a block that is trained, as a share of the average
_TINY: Final = 1e-12  # an error that counts as none
_LARGE: Final = 2**26  # bytes of a tensor of all images above which it is kept in half precision
_ROOM: Final = 2**29  # bytes that it may take; where that is too little, fewer images are used


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """What became of one block, judged on held-out images.

    Attributes:
        name: the block, by its modules.
        before: error before its training, given what the trained blocks before it return: a share of the variance of
            the dense block's output, for the last block the KL divergence in nats.
        after: error afterwards; that of before where the block kept its weights.
        steps: optimiser steps of its training; 0 where it was left alone.
        rate: peak learning rate; ``None`` where it kept its weights.
    """

    name: str
    before: float
    after: float
    steps: int
    rate: float | None


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """The result of ``reconstruct_blocks_``.

    Attributes:
        blocks: the blocks in the order in which they run.
        images: number of images, held-out ones included, mirror images not.
        rate: learning rate that the first blocks chose; ``None`` where no block was trained.
    """

    blocks: tuple[BlockResult, ...]
    images: int
    rate: float | None


#: Called after each block with its number from 1, the number of blocks, and its result.
Tell = Callable[[int, int, BlockResult], None]


def reconstruct_blocks_(
    pruned: nn.Module,
    dense: nn.Module,
    plan: Plan,
    images: Tensor,
    *,
    steps: int,
    mirrored: bool,
    seed: int,
    tell: Tell,
) -> Reconstruction:
    """Train the blocks of ``pruned`` in place, each on what the same block of ``dense`` returns.

    The same seed gives the same weights. Parameters that need no gradient, and those that several blocks read, stay as
    they are. Modes, gradients and random generators are left as they were found.

    Memory: what one block is given and returns, in both nets, for all images and mirror images, lies on the CPU; half
    precision above 64 MiB a tensor, and fewer images where that would take more than 512 MiB. One batch at a time goes
    to the device of the nets.

    Args:
        pruned: the net that was cut by ``plan`` from ``dense``; both on one device.
        dense: the dense net, which is not changed.
        plan: the plan of the cut.
        images: images ``[N, C, H, W]``, at least two.
        steps: optimiser steps a block, on average.
        mirrored: whether mirror images are used too.
        seed: seed of the batches.
        tell: callback after each block.
    """
    device = images.device
    with own_randomness(device), evaluation_mode(pruned), evaluation_mode(dense):
        torch.manual_seed(seed)  # a net may draw in evaluation mode too
        flow, blocks = find_blocks(pruned, dense, plan, images[:2])
        ends = [block.end for block in blocks if block.end]
        teacher, student = (Segments(net, flow, ends, images[:1]) for net in (dense, pruned))
        used = images[: _room(teacher, images, mirrored=mirrored)]
        work = _Work(pruned, teacher, student, blocks, used, mirrored=mirrored, seed=seed)
        results = work.run(steps, tell)
    return Reconstruction(blocks=results, images=len(used), rate=work.rate)


class _Work:
    """The training of all blocks, one after the other.

    Tensors of all images hold training images, then their mirror images, then the held-out images.
    """

    def __init__(
        self,
        pruned: nn.Module,
        teacher: Segments,
        student: Segments,
        blocks: Sequence[Block],
        images: Tensor,
        *,
        mirrored: bool,
        seed: int,
    ) -> None:
        self.teacher, self.student, self.blocks, self.seed = teacher, student, blocks, seed
        self.pruned, self.device = pruned, images.device
        self.parameters = dict(pruned.named_parameters())
        training, held_out = images.split([len(images) - self.held_out(len(images)), self.held_out(len(images))])
        self.images = torch.cat([training, training.flip(3), held_out] if mirrored else [training, held_out]).cpu()
        self.count = len(self.images) - len(held_out)  # of those that are trained on
        self.caches = bool(clear_caches_(pruned))
        self.trials: dict[float, list[float]] = {rate: [] for rate in RATES}  # log of what was left of the errors
        self.rate: float | None = None

    @staticmethod
    def held_out(images: int) -> int:
        """Number of images on which blocks are judged."""
        return max(1, images // _HELD_OUT)

    def run(self, steps: int, tell: Tell) -> tuple[BlockResult, ...]:
        """Train all blocks with so many steps on average."""
        allotted = allot(self._errors(), steps)
        given = wanted = self.images
        results = []
        for number, block in enumerate(self.blocks):
            wanted = _through(self.teacher, number, wanted, self.device)
            results.append(self._train_(number, block, given, wanted, allotted[number]))
            tell(number + 1, len(self.blocks), results[-1])
            if number < len(self.blocks) - 1:
                given = _through(self.student, number, given, self.device)
        return tuple(results)

    def _errors(self) -> list[float]:
        """Errors of all blocks before any training, on the held-out images, that of the logits as a share as well."""
        given = wanted = self.images[self.count :]
        errors = []
        for number, block in enumerate(self.blocks):
            given = _through(self.student, number, given, self.device)
            wanted = _through(self.teacher, number, wanted, self.device)
            target = _kept(block, wanted).float()
            errors.append(float((given.float() - target).square().mean() / target.var()))
        return errors

    def _train_(self, number: int, block: Block, given: Tensor, wanted: Tensor, steps: int) -> BlockResult:
        """Train one block and keep its best weights.

        As long as no rate is chosen, every rate is tried; then the chosen one, and lower ones until one helps.
        """
        parameters = [self.parameters[name] for name in block.parameters if self.parameters[name].requires_grad]
        loss = _loss(block, wanted[: self.count])
        before = self._held_out_loss(number, loss, given, wanted)
        best = BlockResult(name=block.name, before=before, after=before, steps=0, rate=None)
        if not steps or not parameters or (block.end and before < _NEGLIGIBLE):
            return best
        start = weights = [parameter.detach().clone() for parameter in parameters]
        for rate in reversed(RATES):
            if self.rate is not None and (rate > self.rate or best.rate is not None):
                continue
            self._set_(parameters, start)
            self._fit_(number, parameters, loss, given, wanted, rate=rate, steps=steps)
            after = self._held_out_loss(number, loss, given, wanted)
            if self.rate is None:
                self.trials[rate].append(
                    math.log(max(after, _TINY) / max(before, _TINY)) if math.isfinite(after) else math.inf
                )
            if after < best.after:
                best = BlockResult(name=block.name, before=before, after=after, steps=steps, rate=rate)
                weights = [parameter.detach().clone() for parameter in parameters]
        self._set_(parameters, weights)
        if self.rate is None and len(self.trials[RATES[0]]) == _TRIALS:
            self.rate = min(RATES, key=lambda rate: sum(self.trials[rate]))
        return best

    def _fit_(
        self,
        number: int,
        parameters: Sequence[nn.Parameter],
        loss: Loss,
        given: Tensor,
        wanted: Tensor,
        *,
        rate: float,
        steps: int,
    ) -> None:
        """Some steps of Adam on a block's parameters; the batches are the same at every rate."""
        draw = generator(BLOCKS, self.seed, number)
        optimizer = torch.optim.Adam(parameters, lr=rate)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            at = torch.randint(self.count, (min(_BATCH, self.count),), generator=draw)
            with torch.enable_grad():
                made = self.student.run(number, given[at].to(self.device).float())
                error = loss(made, wanted[at].to(self.device).float())
            gradients = torch.autograd.grad(error, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            self._clear_caches_()
        for parameter in parameters:
            parameter.grad = None

    @torch.no_grad()
    def _set_(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
        self._clear_caches_()

    def _clear_caches_(self) -> None:
        """Throw away what a forward pass made from weights that have changed since."""
        if self.caches:
            clear_caches_(self.pruned)

    @torch.no_grad()
    def _held_out_loss(self, number: int, loss: Loss, given: Tensor, wanted: Tensor) -> float:
        """Mean loss of a block on the held-out images."""
        pairs = zip(given[self.count :].split(_PASS), wanted[self.count :].split(_PASS), strict=True)
        total = 0.0
        for x, target in pairs:
            made = self.student.run(number, x.to(self.device).float())
            total += float(loss(made, target.to(self.device).float())) * len(x)
        return total / (len(given) - self.count)


def allot(errors: Sequence[float], steps: int) -> list[int]:
    """Optimiser steps of each block, in proportion to its error and within bounds; none where that is negligible.

    Args:
        errors: errors of the blocks before any training, as shares of the variance.
        steps: steps a block, on average over those that are trained.
    """
    mean = sum(error for error in errors if error >= _NEGLIGIBLE) / max(
        1, sum(error >= _NEGLIGIBLE for error in errors)
    )
    return [round(steps * min(_MOST, max(_LEAST, error / mean))) if error >= _NEGLIGIBLE else 0 for error in errors]


Loss = Callable[[Tensor, Tensor], Tensor]


def _loss(block: Block, wanted: Tensor) -> Loss:
    """The loss of a block's output, given the dense block's; its scale is that of all training images."""
    if block.end is None:
        return lambda made, logits: nn.functional.kl_div(
            made.log_softmax(1), logits.log_softmax(1), log_target=True, reduction="batchmean"
        )
    variance = _variance(block, wanted)
    return lambda made, target: (made - _kept(block, target)).square().mean() / variance


def _variance(block: Block, wanted: Tensor) -> float:
    """Variance of all entries of the kept part of a tensor, summed in float64."""
    count, total, squares = 0, 0.0, 0.0
    for part in wanted.split(_PASS):
        values = _kept(block, part).double()
        count, total, squares = (
            count + values.numel(),
            total + float(values.sum()),
            squares + float(values.square().sum()),
        )
    return max(squares / count - (total / count) ** 2, _TINY)


def _kept(block: Block, wanted: Tensor) -> Tensor:
    return block.kept.of(wanted) if block.kept else wanted


@torch.no_grad()
def _through(net: Segments, number: int, given: Tensor, device: torch.device) -> Tensor:
    """What one block returns for all images, on the CPU, in half precision where that is large and can hold it."""
    parts = given.split(_PASS)
    first = net.run(number, parts[0].to(device).float()).cpu()
    half = first[0].numel() * len(given) * 4 > _LARGE and first.abs().max() < torch.finfo(torch.float16).max / 16
    kind = torch.float16 if half else torch.float32
    made = torch.empty(len(given), *first.shape[1:], dtype=kind)
    for at, part in enumerate(parts):
        made[at * _PASS : at * _PASS + len(part)] = net.run(number, part.to(device).float()).cpu() if at else first
    return made


def _room(net: Segments, images: Tensor, *, mirrored: bool) -> int:
    """Number of images whose tensors fit into the room that there is, in half precision."""
    copies = 2 if mirrored else 1
    return max(2, min(len(images), _ROOM // (2 * copies * max(1, net.widest))))
