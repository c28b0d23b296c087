"""Weights files: reading them without executing anything, unwrapping checkpoints and loading strictly."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prunecli.errors import PruneError, UsageError, listed, one_line
from prunecli.values.groups import module_of
from prunecli.values.plan import ModelRef

TORCH_SUFFIXES = frozenset({".pth", ".pt", ".bin", ".tar", ".th", ".ckpt"})
EMA_KEYS = ("state_dict_ema", "model_ema")
PLAIN_KEYS = ("state_dict", "model")
WRAPPERS = ("module.", "_orig_mod.")
_NAMED = 3  # tensors that do not fit and are named; the rest are counted


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Run the ``with`` block with every ``torch.load`` refusing code, also timm's, whose older versions would not."""
    force, forbid = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, forbid)}
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


# ---------------------------------------------------------------------------------------------- weight files


def existing_file(path: str | Path) -> Path:
    """The weights file at ``path``.

    Raises:
        UsageError: it does not exist, or its ending is unknown.
        PruneError: it is not a file.
    """
    file = Path(path)
    if not file.exists():
        raise UsageError(f"Weights file {file} does not exist.")
    if not file.is_file():
        raise PruneError(f"Weights file {file} is not a file.")
    if file.suffix != ".safetensors" and file.suffix not in TORCH_SUFFIXES:
        raise UsageError(
            f"Weights file {file} has the unknown ending {file.suffix!r}.",
            hint=f"Known: .safetensors, {', '.join(sorted(TORCH_SUFFIXES))}.",
        )
    return file


def read_state(file: Path, notes: list[str]) -> dict[str, Tensor]:
    """Name → tensor of a weights file, wrappers taken off. Nothing in the file is executed.

    Args:
        file: ``.safetensors`` or torch file.
        notes: list that gets a sentence where averaged weights were preferred.

    Raises:
        PruneError: the file cannot be read, would execute code, or holds no state_dict.
    """
    if file.suffix == ".safetensors":
        try:
            return _unwrapped(load_file(file), file, notes)
        except (SafetensorError, OSError) as error:
            raise PruneError(f"{file} is damaged, truncated or no safetensors file: {one_line(error)}.") from error
    try:
        # timm's and torchvision's training scripts store their arguments; a Namespace is plain data
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # it is read or refused all the same
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError, KeyError, IndexError) as error:
        raise explain_unreadable(str(file), error) from error
    return _unwrapped(content, file, notes)


def explain_unreadable(what: str, error: BaseException) -> PruneError:
    """The error for a torch file that could not be read: it asks for code, fits another model, or is broken.

    Args:
        what: beginning of the message, which names the file or the model.
        error: exception that reading the file raised.
    """
    text = f"{error} {error.__cause__ or ''}"
    if "weights_only" in text.lower() or "weights only" in text.lower():
        wanted = re.search(r"(?:GLOBAL|globals?:)\s+([\w.]*\w\.\w+)", text)
        if wanted or "Unsupported" in text:
            why = f"it asks for {wanted[1]}" if wanted else "it holds more than tensors"
            return PruneError(
                f"{what}: refused, because {why}; nothing was executed.",
                hint="Save the tensors alone: torch.save(model.state_dict(), FILE), or better safetensors.",
            )
    if "loading state_dict" in text:
        return PruneError(f"{what} do not fit the architecture: {one_line(error)}.")
    reason = "" if isinstance(error, KeyError) else f" ({one_line(error)})"  # a KeyError's text is a bare "101"
    return PruneError(f"{what}: damaged, truncated or no torch file{reason}.")


def _unwrapped(content: object, file: Path, notes: list[str]) -> dict[str, Tensor]:
    """The state_dict inside a checkpoint: averaged weights first, then ``state_dict``/``model``, wrapper names off."""
    state = content
    if isinstance(content, Mapping):
        key = next((k for k in (*EMA_KEYS, *PLAIN_KEYS) if isinstance(content.get(k), Mapping)), None)
        state = content[key] if key else content
        if key in EMA_KEYS:
            notes.append(f"{file.name} holds averaged weights ({key}); they were used")
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise PruneError(f"{file} holds no state_dict (names with tensors).")
    named = {str(k): v for k, v in state.items() if k != "n_averaged"}  # the counter of torch's AveragedModel
    while wrapper := next((w for w in WRAPPERS if named and all(k.startswith(w) for k in named)), None):
        named = {k.removeprefix(wrapper): v for k, v in named.items()}
    return named


def load_strictly_(model: nn.Module, state: Mapping[str, Tensor], *, file: Path, ref: ModelRef) -> None:
    """Load a state_dict that has every tensor of the model with its shape and nothing else, in place.

    Only BatchNorm's counters may be missing.

    Args:
        model: module to fill.
        state: name → tensor, as ``read_state`` returns them.
        file: file they come from, for the message.
        ref: reference of the model, for the message.

    Raises:
        PruneError: names the first tensors that do not fit.
    """
    own = model.state_dict(keep_vars=True)
    given = {id(own[n]) for n in own if n in state}  # a shared tensor needs to be there under one of its names
    missing = [n for n in own if id(own[n]) not in given and not n.endswith("num_batches_tracked")]
    extra = [n for n in state if n not in own]
    other = [n for n in state if n in own and state[n].shape != own[n].shape]
    problems = [
        ("missing", missing),
        ("unknown", extra),
        ("of another shape", [f"{n} is {_dims(state[n])}, the model's is {_dims(own[n])}" for n in other]),
    ]
    if found := "; ".join(f"{len(names)} {what} ({listed(names, _NAMED)})" for what, names in problems if names):
        hint = None if missing or extra else _class_count_hint(other, state, ref)
        raise PruneError(f"{file} does not fit {ref.name}: {found}.", hint=hint)
    model.load_state_dict(dict(state), strict=False)


def _class_count_hint(other: list[str], state: Mapping[str, Tensor], ref: ModelRef) -> str | None:
    """The hint with the number of classes that would fit, where only the classifier differs; else ``None``."""
    named = ref.pretrained_cfg.get("classifier") or ()
    heads = (named,) if isinstance(named, str) else tuple(named)
    if not all(module_of(name) in heads for name in other):
        return None
    return f"Only the classifier differs; give --model-arg num_classes={state[other[0]].shape[0]}."


def _dims(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
