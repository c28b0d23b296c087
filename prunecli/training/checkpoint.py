"""Checkpoints of the fine-tuning: one safetensors file each, its position and history in the header, no pickle.

A folder holds the newest checkpoint only; the one before is removed once the new one is on the disk, so a kill at any
moment leaves a whole one. Random state needs no bytes: the loop's random numbers follow from (seed, epoch, step).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from prunecli.errors import PruneError
from prunecli.files import explained, write_tensors
from prunecli.values.value import Value

logger = logging.getLogger("prunecli")
_KEY = "prunecli_finetune"


class TrainingPosition(Value):
    """How far a training is, and what it measured so far."""

    model_config = ConfigDict(populate_by_name=True)

    # "job" in the file, as checkpoints have had it from the start
    digest: str = Field(
        alias="job", description="of all that decides the weights; only a training with an equal one resumes this one"
    )
    epoch: int = Field(default=0, ge=0, description="epochs completed")
    step: int = Field(default=0, ge=0, description="optimiser steps taken in the running epoch")
    loss_sum: float = Field(default=0.0, description="sum of the running epoch's step losses")
    seconds: float = Field(default=0.0, description="time spent in the running epoch")
    history: tuple[dict[str, float], ...] = ()


def save(folder: Path, progress: TrainingPosition, tensors: Mapping[str, Tensor]) -> Path:
    """Write one checkpoint durably, then remove the older ones.

    Args:
        folder: folder of the checkpoints of one training.
        progress: position and history.
        tensors: weights, optimiser state and what else the training has to remember, by name.

    Returns:
        The file written.

    Raises:
        PruneError: the disk refuses.
    """
    path = folder / f"state-{progress.epoch:05d}-{progress.step:08d}.safetensors"
    write_tensors(path, tensors, {_KEY: json.dumps(progress.model_dump(mode="json", by_alias=True), allow_nan=False)})
    with explained(path):
        _flush_names(folder)
        for other in (*folder.glob("state-*.safetensors"), *folder.glob(".state-*.tmp")):
            if other != path:
                other.unlink(missing_ok=True)
    return path


def newest(folder: Path, *, digest: str) -> tuple[TrainingPosition, dict[str, Tensor]] | None:
    """The latest checkpoint of the training with this digest, tensors on the CPU; ``None`` where there is none.

    A file that is truncated, or belongs to another training, is passed over and logged.
    """
    for path in sorted(folder.glob("state-*.safetensors"), reverse=True):
        try:
            with safe_open(path, framework="pt") as file:
                progress = TrainingPosition.model_validate_json((file.metadata() or {})[_KEY])
                if progress.digest == digest:
                    return progress, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValidationError) as error:
            logger.warning("Checkpoint %s cannot be used (%s); it is passed over.", path, error)
            continue
        logger.warning("Checkpoint %s belongs to another job (settings, seed or weights differ).", path)
    return None


def _flush_names(folder: Path) -> None:
    """Bring the folder's entries to the disk, so that no file is removed before its successor is there."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------ tensors by name


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``name`` -> ``PREFIX.name``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def unprefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors saved under one prefix, without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as ``PARAMETER.KEY`` -> tensor (``conv1.weight.momentum_buffer``)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None  # plain SGD keeps an empty momentum buffer
    }


def restore_optimizer_(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the state of `optimizer_tensors` back; learning rates stay as they are, the schedule sets them.

    Raises:
        PruneError: the state names a parameter the model does not have.
    """
    parameters = dict(model.named_parameters())
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {id(parameter): i for i, parameter in enumerate(order)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        if name not in parameters:
            raise PruneError(f"The saved optimiser state names {name!r}, which the model does not have.")
        parameter = parameters[name]
        if value.ndim and value.shape == parameter.shape:  # in the parameter's memory format, as fused kernels want it
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)  # noqa: PLW2901
        state.setdefault(index[id(parameter)], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
