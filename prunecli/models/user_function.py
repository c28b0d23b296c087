"""A model of the user's own: ``module:function`` names a function, or a class, that makes an ``nn.Module``.

Naming a function is consenting to run it. So the name and its arguments come from whoever asks (command line, recipe,
Python), never from a folder that is only to be loaded: what such a folder records is compared and not called.
"""

from __future__ import annotations

import copy
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from prunecli.errors import PruneError, UnsupportedError, UsageError, nearest, one_line
from prunecli.models.outputs import logits_of
from prunecli.models.tensors import clear_caches_
from prunecli.recipe.settings import DataSettings
from prunecli.values.plan import ModelRef

_NAME: Final = re.compile(r"(?!hf_hub:)[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
# What a module may declare of its input, in the words of timm's pretrained_cfg.
_DECLARED: Final = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def names_function(name: str) -> bool:
    """Whether ``name`` has the form ``package.module:function``."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class Function:
    """``module:function`` with its keyword arguments. Making one imports nothing; calling it does.

    Attributes:
        name: ``package.module:function``.
        args: keyword arguments of the function, JSON values.
    """

    name: str
    args: Mapping[str, Any]

    @classmethod
    def of(cls, ref: ModelRef) -> Self | None:
        """The function of a reference, ``None`` where timm builds it.

        Only for a reference that this process made or loaded with consent, never for one that was just read.
        """
        return cls(name=ref.name, args=ref.args) if ref.is_function else None

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.args.items())})"

    def __call__(self) -> object:
        """Import the module, as ``python -m`` would from the current folder too, and call the function.

        What the function itself raises is passed on.

        Raises:
            UsageError: there is no such function, or its module cannot be imported.
        """
        with _current_folder_first():
            return _found(self.name)(**self.args)


@contextmanager
def _current_folder_first() -> Iterator[None]:
    folder = str(os.getcwd())  # noqa: PTH109 - sys.path holds text
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _found(name: str) -> Callable[..., object]:
    if not names_function(name):
        raise UsageError(f"{name!r} does not name a function.", hint="Write package.module:function.")
    module_name, _, path = name.partition(":")
    if module_name == "__main__":
        raise UsageError(f"{name!r} cannot be imported again by another process.", hint="Put it into a file.")
    try:
        value: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything while it is imported
        raise UsageError(
            f"Module {module_name!r} of {name!r} cannot be imported: {one_line(error)}.",
            hint="It is looked for in the current folder and where Python finds its packages.",
        ) from error
    for part in path.split("."):
        if not hasattr(value, part):
            public = [key for key, item in vars(value).items() if callable(item) and not key.startswith("_")]
            raise UsageError(f"Module {module_name!r} has no {path!r}.", hint=nearest(part, public))
        value = getattr(value, part)
    if isinstance(value, nn.Module) or not callable(value):
        raise UsageError(
            f"{name!r} is of type {type(value).__name__} and no function.",
            hint="Name a function that returns the model.",
        )
    made: Callable[..., object] = value
    return made


# ---------------------------------------------------------------------------------------------- making


def make(function: Callable[[], object], *, title: str, seed: int = 0, notes: list[str] | None = None) -> nn.Module:
    """The module that ``function`` makes, ready to prune: a copy of its own, float32, on the CPU, in eval mode.

    Args:
        function: ``Function``, or any callable of the caller's.
        title: name of the model in messages.
        seed: seed of torch's generator while the function runs; the caller's random state is left alone.
        notes: list that gets a sentence where the weights had to change their type.

    Raises:
        UsageError: the function does not exist, fails, or returns something else than a module with weights.
        UnsupportedError: a module that cannot be copied, or holds what no safetensors file can.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = function()
    except (PruneError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UsageError(f"{title} failed: {type(error).__name__}: {one_line(error)}.") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"{title} returned {type(made).__name__}, not an nn.Module.")
    if isinstance(made, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UsageError(f"{title} returned a {type(made).__name__}.", hint="Return the module inside it.")
    _require_weights(made, title)
    try:
        # A copy, because the function may hand out the same module each time, which stays as it is.
        model = copy.deepcopy(made).cpu().eval()
        cleared = clear_caches_(copy.deepcopy(model))
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise UnsupportedError(f"{title}: the module cannot be copied: {one_line(error)}.") from error
    if cleared:
        raise UnsupportedError(
            f"{title} holds tensors in the plain dict {cleared[0]!r}, which would be taken for a cache.",
            hint="Register them as buffers.",
        )
    types = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if types and notes is not None:
        notes.append(f"weights of {', '.join(sorted(map(str, types)))} are taken as torch.float32")
    return model.float() if types else model


def _require_weights(model: nn.Module, title: str) -> None:
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise UnsupportedError(f"{title}: {name!r} of its state_dict is a {type(value).__name__}, not a tensor.")
        if nn.parameter.is_lazy(value) or value.is_meta:
            raise UsageError(
                f"{title}: {name!r} has no values yet.", hint="Let the function run the model once, or load weights."
            )
    if next(model.parameters(), None) is None:
        raise UsageError(f"{title} has no parameters.")


# ---------------------------------------------------------------------------------------------- what it takes and gives


def declared_input(model: nn.Module) -> dict[str, Any]:
    """The images that the module itself declares: the known keys of its ``pretrained_cfg`` or ``default_cfg``.

    Raises:
        UsageError: the declared size, mean or standard deviation cannot be one.
    """
    found = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    cfg = found.to_dict() if hasattr(found, "to_dict") else found
    declared = {key: cfg[key] for key in _DECLARED if isinstance(cfg, Mapping) and cfg.get(key) is not None}
    try:
        checked = DataSettings(**{key: declared[key] for key in ("input_size", "mean", "std") if key in declared})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"The {first['loc'][0]} that the model declares is wrong: {first['msg']}, not {first['input']!r}."
        ) from None
    return declared | checked.preprocessing


def count_classes(model: nn.Module, size: tuple[int, int, int], *, title: str) -> int:
    """The number of logits that the model returns, found by one forward pass.

    Args:
        model: module in eval mode, on the CPU.
        size: channels, height and width of an image.
        title: name of the model in messages.

    Raises:
        UsageError: the model does not take such an image.
        UnsupportedError: the model does not return logits.
    """
    try:
        with torch.no_grad():
            output = copy.deepcopy(model)(torch.zeros(1, *size))
    except Exception as error:  # a model's forward may raise anything
        raise UsageError(
            f"{title} does not take an image of {'x'.join(map(str, size))}: {type(error).__name__}: {one_line(error)}.",
            hint="Give 'data.input_size=[CHANNELS,HEIGHT,WIDTH]', or let the function set model.pretrained_cfg. "
            "A forward that needs more than images needs a module around it that takes images alone.",
        ) from error
    classes = logits_of(output).shape[1]
    if classes == 0:
        raise UnsupportedError(f"{title} has no classifier, so there is no accuracy to keep.")
    return classes
