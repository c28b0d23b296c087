"""Singular values: of the input-logit Jacobian (exact, per sample) and of every layer's weight matrix.

Shapes: images ``[B, C, H, W]``, logits ``[B, K]``, one Jacobian ``[K, C*H*W]`` a sample, its ``min(K, C*H*W)`` singular
values largest first.

The Jacobian is that of the eval-mode net from normalised input to logits (no softmax), as in Wang and Fu (arXiv
2105.05916); there, one backward pass a class collects it. Here ``vmap`` pulls back many rows of many samples at once,
three identities save work, and none of them approximates:

* BatchNorm in eval mode is a fixed scale and shift, whose pull-back is one product.
* Logits that come out of a linear layer narrower than it is wide, ``y = W f + b`` with ``W [K, D]``, ``D < K``:
  with ``W = Q R``, the singular values of ``W J_f`` are those of ``R J_f`` and ``K - D`` zeros, so ``D`` rows do.
* Singular values of a float32 matrix are the roots of the eigenvalues of its float64 Gram matrix: that resolves down to
  about 1e-8 of the largest one, and a float32 Jacobian holds no more. A float64 model gets a plain SVD.

Where K rows are too many, `jacobian_estimate` needs a few products with J and J^T instead (see ``lanczos``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from prunecli.errors import PruneError, UnsupportedError, one_line
from prunecli.measure import lanczos
from prunecli.measure.weights import singular_values
from prunecli.models.layers import evaluation_mode
from prunecli.models.outputs import logits_of
from prunecli.values.report import SpectrumSummary

log = logging.getLogger("prunecli")

_HELD_ELEMENTS = 2**26  # Jacobian entries held at once (256 MiB in float32); one sample's Jacobian always fits


@dataclass(frozen=True, kw_only=True)
class JacobianSpectrum:
    """Singular values of every image's Jacobian.

    Attributes:
        values: singular values ``[B, min(K, C*H*W)]``, float64, on the CPU, largest first.
        summary: their mean, spread and condition over the images.
    """

    values: Tensor
    summary: SpectrumSummary


def jacobian_spectrum(model: nn.Module, batch: Tensor, *, chunk: int = 32) -> JacobianSpectrum:
    """Exact singular values of the input-logit Jacobian of every image in ``batch``.

    The model is evaluated in eval mode whatever its training flags are, and is left as it was: flags, buffers and
    parameter gradients. Memory: the Jacobians of as many samples as fit 256 MiB, at least one (``K*C*H*W`` entries).

    Operators whose backward ``vmap`` cannot batch are handled by running the images once for each row of a chunk
    through an ordinary backward pass: same values, up to half as fast again.

    Args:
        model: module from images ``[B, C, H, W]`` to logits ``[B, K]``; samples must not influence each other.
        batch: images ``[B, C, H, W]`` on the model's device and in its dtype. float64 throughout gives singular values
            to 1e-16 of the largest; in float32 those below about 1e-7 of the largest are rounding.
        chunk: number of rows, over all Jacobians, that are pulled back at once. On a CPU, larger buffers go back to the
            system after every operator and cost page faults (64 rows took up to 1.5 times as long as 32 on small nets).

    Raises:
        ValueError: an empty batch, or a chunk below one.
        UnsupportedError: the output is not ``[B, K]``, does not depend on the input, or samples are coupled
            (BatchNorm without running statistics).
        PruneError: a Jacobian with NaN or infinite entries.
    """
    if batch.dim() < 2 or len(batch) == 0:
        raise ValueError(f"expected a batch [B, C, H, W] of at least one image, got shape {tuple(batch.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    net = _Net(model)
    with evaluation_mode(model), torch.enable_grad():
        classes = net.classes(batch[:1])
        size = math.prod(batch.shape[1:])
        held = max(1, min(len(batch), chunk, _HELD_ELEMENTS // (classes * size)))
        parts = []
        for start in range(0, len(batch), held):
            jacobians = net.jacobians(batch[start : start + held], chunk)
            if not torch.isfinite(jacobians).all():
                raise PruneError("The Jacobian has NaN or infinite entries; the weights or the images are broken.")
            parts.append(functional.pad(found := singular_values(jacobians), (0, min(classes, size) - found.shape[-1])))
            del jacobians  # before the next one is made: it may be all the memory there is room for
    values = torch.cat(parts).cpu()
    return JacobianSpectrum(values=values, summary=summarise(values))


def jacobian_estimate(model: nn.Module, batch: Tensor, *, steps: int = 30, seed: int = 0) -> JacobianSpectrum:
    """The spectrum of `jacobian_spectrum`, estimated from ``steps`` products with each Jacobian and its transpose.

    All images advance together, from one random vector each: ``J^T v`` by a recorded pass, ``J w`` by a pass with
    forward derivatives (where an operator has none, as the derivative of ``J^T v`` with respect to v). The summary's
    method is ``lanczos``; it has the standard error of its mean over these images, its smallest value is an upper
    bound, its largest and its condition are lower bounds.
    ``values`` ``[B, min(K, C*H*W)]`` are spread as the estimated density is: for histograms.

    Memory: what a training step of this batch takes, and ``2 * steps`` vectors an image.

    Args:
        model: module as for `jacobian_spectrum`, whose operators have forward derivatives, or are differentiable twice.
        batch: images ``[B, C, H, W]`` on the model's device and in its dtype.
        steps: number of products with each Jacobian and with its transpose; never more than there are logits.
        seed: seed of the random vectors.

    Raises:
        ValueError: an empty batch, or fewer than one step.
        UnsupportedError: a model that `jacobian_spectrum` refuses, or an operator whose derivative cannot be
            differentiated.
        PruneError: a Jacobian with NaN or infinite entries.
    """
    if batch.dim() < 2 or len(batch) == 0:
        raise ValueError(f"expected a batch [B, C, H, W] of at least one image, got shape {tuple(batch.shape)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    with evaluation_mode(model), torch.enable_grad():
        net = _Net(model)
        tape, classes = net.record(batch)
        forward, adjoint = _products(net, tape)
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(len(batch), len(tape.seeds), generator=generator).to(tape.seeds)
        density = lanczos.spectral_density(forward, adjoint, start, steps=steps)
    if not torch.isfinite(density.nodes).all():
        raise PruneError("The Jacobian has NaN or infinite entries; the weights or the images are broken.")
    count = min(classes, math.prod(batch.shape[1:]))
    values = functional.pad(density.quantiles(min(density.size, count)), (0, max(count - density.size, 0)))
    return JacobianSpectrum(values=values, summary=_estimated(density, count))


def _estimated(density: lanczos.Density, count: int) -> SpectrumSummary:
    """The summary of a spectrum of ``count`` values, of which ``density`` leaves out those known to be zero."""
    found = min(density.size / count, 1.0)  # the share of the values that the density stands for
    means = found * density.mean
    mean = float(means.mean())
    square = float(found * density.moment(2).mean())
    smallest = density.nodes[:, -1] if density.size >= count else torch.zeros(len(means))
    ratios = density.nodes[:, 0] / smallest
    ratios = ratios[torch.isfinite(ratios)]
    return SpectrumSummary(
        method="lanczos",
        mean=mean,
        mean_error=found * float(density.mean_error.square().sum().sqrt()) / len(means),
        std=math.sqrt(max(square - mean**2, 0.0)),
        min=float(smallest.min()),
        max=float(density.nodes.max()),
        condition=float(ratios.mean()) if len(ratios) else None,
        samples=len(means),
    )


def summarise(values: Tensor) -> SpectrumSummary:
    """Mean, population standard deviation, least and largest value; mean condition over the samples.

    A sample whose smallest singular value is zero has no finite condition and is left out of that mean.

    Args:
        values: singular values ``[B, N]``, a row for each sample.
    """
    ratios = values.amax(dim=1) / values.amin(dim=1)
    ratios = ratios[torch.isfinite(ratios)]
    return SpectrumSummary(
        mean=float(values.mean()),
        std=float(values.std(correction=0)),
        min=float(values.min()),
        max=float(values.max()),
        condition=float(ratios.mean()) if len(ratios) else None,
        samples=len(values),
    )


# ---------------------------------------------------------------------------------------------- Jacobians


class _EvalForward(TorchFunctionMode):
    """Eval-mode BatchNorm as scale and shift; remembers the last linear layer that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.linear: tuple[Tensor, Tensor, Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.batch_norm:
            return _fixed_batch_norm(*args, **kwargs)
        result = func(*args, **kwargs)
        if func is functional.linear:
            inputs, weight = (*args, *kwargs.values())[:2]
            self.linear = (inputs, weight, result)
        return result


def _fixed_batch_norm(
    input: Tensor,  # noqa: A002 - the name callers may pass it by
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        if input.requires_grad:
            raise UnsupportedError(
                "A BatchNorm without running statistics makes every logit depend on the whole batch.",
                hint="A per-sample Jacobian needs running statistics.",
            )
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = (running_var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (1, -1) + (1,) * (input.dim() - 2)
    return input * scale.to(input.dtype).view(shape) + shift.to(input.dtype).view(shape)


@dataclass(frozen=True, kw_only=True)
class _Tape:
    """A recorded forward pass: rows of the Jacobian are ``seeds [rows, D]`` pulled back from ``point [B, D]``.

    The point is the logits, or where it has fewer values (``at_features``) the input of the classifier.
    """

    images: Tensor
    point: Tensor
    seeds: Tensor
    at_features: bool = False


class _Net:
    """The model with its parameters as constants, so that a backward pass computes input gradients and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._constants: Mapping[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}

    def classes(self, image: Tensor) -> int:
        """The number of logits, found by a pass over one image ``[1, C, H, W]``."""
        with torch.no_grad():
            return _logits(torch.func.functional_call(self._model, dict(self._constants), (image,)), 1).shape[1]

    def jacobians(self, images: Tensor, chunk: int) -> Tensor:
        """``[S, rows, C*H*W]``: matrices with the Jacobians' singular values, those beyond ``rows`` being zero."""
        tape = self._record(images)
        try:
            return _stacked(_pulled_by_vmap(tape), tape, chunk)
        except RuntimeError as error:
            if "vmap" not in str(error) and "atching rule" not in str(error):
                raise
        return _stacked(self._pulled_by_repetition(images), tape, chunk)

    def record(self, images: Tensor) -> tuple[_Tape, int]:
        """A pass over ``images`` that can be pulled back any number of times, and the number of logits."""
        return self._record(images), self.classes(images[:1])

    def _record(self, images: Tensor) -> _Tape:
        leaf = images.detach().clone().requires_grad_()
        logits, forward = self._run(leaf)
        if not logits.requires_grad:
            raise UnsupportedError("The logits do not depend on the images; there is no Jacobian.")
        if forward.linear is not None:
            features, weight, result = forward.linear
            narrow = weight.dim() == 2 and weight.shape[1] < weight.shape[0]
            if result is logits and features.dim() == 2 and features.requires_grad and narrow:
                seeds = torch.linalg.qr(weight.double()).R.to(weight.dtype)
                return _Tape(images=leaf, point=features, seeds=seeds, at_features=True)
        eye = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        return _Tape(images=leaf, point=logits, seeds=eye)

    def pushed(self, images: Tensor, tangents: Tensor, *, features: bool) -> Tensor:
        """Derivative ``[B, D]`` of the logits, or of the ``features`` that make them, along ``tangents`` of the images.

        Raises:
            NotImplementedError: an operator without a forward derivative.
        """
        with torch.no_grad(), forward_ad.dual_level():
            logits, forward = self._run(forward_ad.make_dual(images.detach(), tangents))
            assert forward.linear is not None or not features
            point = forward.linear[0] if features and forward.linear else logits
            tangent = forward_ad.unpack_dual(point).tangent
            return torch.zeros_like(point) if tangent is None else tangent.clone()

    def _run(self, images: Tensor) -> tuple[Tensor, _EvalForward]:
        """The logits ``[B, K]``, and what was seen on the way."""
        # Fused attention kernels have no batching rule for their backward; the plain formula has.
        with sdpa_kernel(SDPBackend.MATH), _EvalForward() as forward:
            logits = torch.func.functional_call(self._model, dict(self._constants), (images,))
        return _logits(logits, len(images)), forward

    def _pulled_by_repetition(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        def pull(seeds: Tensor) -> Tensor:
            tape = self._record(images.repeat(len(seeds), *[1] * (images.dim() - 1)))
            cotangents = seeds.repeat_interleave(len(images), dim=0)
            (gradients,) = torch.autograd.grad(tape.point, tape.images, cotangents)
            return gradients.reshape(len(seeds), len(images), -1)

        return pull


def _products(net: _Net, tape: _Tape) -> tuple[lanczos.Product, lanczos.Product]:
    """``w [B, C*H*W] -> J w [B, D]`` and ``u [B, D] -> J^T u``, for the D rows that the tape's seeds name.

    Raises:
        UnsupportedError: an operator has no forward derivative, and its backward pass cannot be differentiated either.
    """

    def adjoint(v: Tensor) -> Tensor:
        (gradients,) = torch.autograd.grad(tape.point, tape.images, v @ tape.seeds, retain_graph=True)
        return gradients.flatten(1)

    def forward(w: Tensor) -> Tensor:
        tangents = w.reshape(tape.images.shape)
        return net.pushed(tape.images, tangents, features=tape.at_features) @ tape.seeds.T

    try:
        forward(torch.zeros_like(tape.images))
    except (NotImplementedError, RuntimeError) as error:
        log.debug("No forward derivative: %s", error)
        return _by_double_backward(tape), adjoint
    return forward, adjoint


def _by_double_backward(tape: _Tape) -> lanczos.Product:
    """``w -> J w`` for nets without forward derivatives.

    ``J^T u`` is linear in u, so its derivative with respect to u, taken at any u, is J. Grouped convolutions take many
    times as long as forward (torch goes through them group by group). Raises UnsupportedError.
    """
    u = torch.zeros(len(tape.images), len(tape.seeds), dtype=tape.seeds.dtype, device=tape.seeds.device)
    u.requires_grad_()
    try:
        (pulled,) = torch.autograd.grad(tape.point, tape.images, u @ tape.seeds, create_graph=True)
        torch.autograd.grad(pulled, u, torch.zeros_like(pulled), retain_graph=True)
    except RuntimeError as error:
        raise UnsupportedError(
            f"The Jacobian cannot be estimated: {one_line(error)}.", hint="Use spectrum.method=exact."
        ) from None

    def forward(w: Tensor) -> Tensor:
        (pushed,) = torch.autograd.grad(pulled, u, w.reshape(pulled.shape), retain_graph=True)
        return pushed

    return forward


def _pulled_by_vmap(tape: _Tape) -> Callable[[Tensor], Tensor]:
    def one_row(seed: Tensor) -> Tensor:
        cotangents = seed.expand(len(tape.images), -1)
        (gradients,) = torch.autograd.grad(tape.point, tape.images, cotangents, retain_graph=True)
        return gradients.flatten(1)

    # Not autograd.grad(is_grads_batched=True): its older vmap falls back to a loop over rows in every convolution.
    return torch.func.vmap(one_row)


def _stacked(pull: Callable[[Tensor], Tensor], tape: _Tape, chunk: int) -> Tensor:
    """All rows, ``chunk`` at a time over rows and samples together."""
    samples, rows = len(tape.images), len(tape.seeds)
    size = math.prod(tape.images.shape[1:])
    jacobians = torch.empty(samples, rows, size, dtype=tape.images.dtype, device=tape.images.device)
    at = 0
    for seeds in tape.seeds.split(max(1, chunk // samples)):
        jacobians[:, at : at + len(seeds)] = pull(seeds).transpose(0, 1)
        at += len(seeds)
    return jacobians


def _logits(output: object, samples: int) -> Tensor:
    logits = logits_of(output)
    if len(logits) != samples:
        raise UnsupportedError(f"The model returns {len(logits)} rows of logits for {samples} images.")
    return logits
