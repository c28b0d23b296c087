"""One recovery step of a job: by name, on a copy (mathematics: ``recover``, ``reconstruction``, ``repair``)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunecli import recover
from prunecli.evaluation import recalibrate_bn_
from prunecli.job import Job
from prunecli.plan import Plan
from prunecli.probe import HELD_OUT
from prunecli.reconstruction import reconstruct_
from prunecli.repair import repair_
from prunecli.stages import spectrum_batch

_CHANGE_STATISTICS: Final = frozenset({"orthp", "blend"})  # BatchNorm's old ones mean nothing after them
_NAMED: Final = 3  # layers left alone that are named; the rest are counted


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is recovered: the job, the weights that were cut, and the plan that cut them."""

    job: Job
    dense: nn.Module
    plan: Plan

    @cached_property
    def images(self) -> Tensor:
        """Calibration images, read once: behind the ones that a probe judges on, as far as there are so many."""
        assert self.job.images is not None
        settings = self.job.recipe.recover
        count = max(settings.lstsq_images, settings.bn_images if has_batch_norm(self.dense) else 0)
        images, _ = self.job.images.calibration(HELD_OUT + count)
        return images[-min(count, len(images)) :]

    def batches(self, count: int) -> tuple[Tensor, ...]:
        """At most ``count`` of them on the job's device."""
        return self.images[:count].to(self.job.device).split(self.job.recipe.data.batch_size)


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A recovered copy, the orthogonality residual where there is one, and what was done in words."""

    model: nn.Module
    residual: float | None = None
    said: str = ""


def apply_steps(subject: Subject, model: nn.Module, steps: Sequence[str]) -> Applied:
    """A copy of ``model``, on the job's device, with these steps applied in turn.

    Orthogonalised and blended weights make the old BatchNorm statistics meaningless, so where there are images these
    steps re-estimate them, unless ``bn`` follows anyway.
    """
    job = subject.job
    model = copy.deepcopy(model).to(job.device)
    residuals, said = [], []
    for step, then in zip_longest(steps, steps[1:]):
        residual, words = _STEPS[step](subject, model)
        residuals += [] if residual is None else [residual]
        said += [words] if words else []
        if step in _CHANGE_STATISTICS and then != "bn" and job.images is not None:
            _bn_(subject, model)
    return Applied(model=model, residual=max(residuals, default=None), said="; ".join(said))


def has_batch_norm(model: nn.Module) -> bool:
    """Whether there are statistics to re-estimate."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


_Did = tuple[float | None, str]


def _orthp_(subject: Subject, model: nn.Module) -> _Did:
    job, settings = subject.job, subject.job.recipe.recover
    example = spectrum_batch(job.images, job.source.spec, 1, seed=job.recipe.seed).to(job.device)
    done = recover.orthogonalize_(
        model, settings.orthp_method, gain=settings.gain, example=example, seed=job.recipe.seed
    )
    return done.residual, ""


def _blend_(subject: Subject, model: nn.Module) -> _Did:
    recover.blend_(model, subject.job.recipe.recover.blend)
    return None, ""


def _lstsq_(subject: Subject, model: nn.Module) -> _Did:
    settings = subject.job.recipe.recover
    images = subject.batches(settings.lstsq_images)
    dense = subject.dense.to(subject.job.device)
    done = reconstruct_(model, dense, subject.plan, images, ridge=settings.ridge)
    return None, f"{_count(len(done.layers), 'layer')} solved from {_count(_images(images), 'image')}{_left(done.left)}"


def _repair_(subject: Subject, model: nn.Module) -> _Did:
    images = subject.batches(subject.job.recipe.recover.lstsq_images)
    done = repair_(model, subject.dense.to(subject.job.device), subject.plan, images)
    dead = f", {_count(done.dead, 'dead channel')} left alone" if done.dead else ""
    words = f"{_count(len(done.layers), 'layer')} repaired, {done.norms} of them in the BatchNorm behind"
    return None, f"{words}{dead}{_left(done.left)}"


def _bn_(subject: Subject, model: nn.Module) -> _Did:
    job = subject.job
    if has_batch_norm(model):
        batches = subject.batches(job.recipe.recover.bn_images)
        whole = [batch for batch in batches if len(batch) == len(batches[0])]  # each counts alike in the mean
        recalibrate_bn_(model, whole, device=job.device)
    return None, ""


_STEPS: Final[Mapping[str, Callable[[Subject, nn.Module], _Did]]] = {
    "lstsq": _lstsq_,
    "repair": _repair_,
    "orthp": _orthp_,
    "blend": _blend_,
    "bn": _bn_,
}


def _images(batches: Sequence[Tensor]) -> int:
    return sum(len(batch) for batch in batches)


def _left(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return ""
    named = [f"{name}: {reason}" for name, reason in list(reasons.items())[:_NAMED]]
    more = [f"{len(reasons) - _NAMED} more"] if len(reasons) > _NAMED else []
    return f", {_count(len(reasons), 'layer')} left alone ({'; '.join(named + more)})"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
