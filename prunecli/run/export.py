"""The exported model: written and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from prunecli import __version__
from prunecli.errors import PruneError, UnsupportedError, UsageError
from prunecli.files import read_json, read_tensors, sha256_of, write_json, write_tensors
from prunecli.models import user_function
from prunecli.models.build import build, input_spec
from prunecli.models.outputs import as_rows, logits_of
from prunecli.models.tensors import named_tensors
from prunecli.models.user_function import Function
from prunecli.run.folder import RunFolder
from prunecli.surgery.structure import fill_, shape_, structure_of
from prunecli.values.plan import Cost, ModelRef, Structure
from prunecli.values.value import Value

_VERIFY_IMAGES: Final = 2


class Exported(Value):
    """The ``prunecli`` part of config.json: what a loader needs beside the weights."""

    version: str
    model: ModelRef
    structure: Structure
    weights_sha256: str
    weights_bytes: int
    base: Cost
    final: Cost


# ---------------------------------------------------------------------------------------------- export and load


def export(folder: RunFolder, model: nn.Module, *, ref: ModelRef, base: Cost, final: Cost) -> Structure:
    """Write model.safetensors, config.json and the reference logits that ``verify`` compares with.

    Args:
        folder: where to.
        model: the pruned model.
        ref: what it was made from; where that is a function, it is called.
        base: cost of the dense model.
        final: cost of this one.

    Raises:
        PruneError: the disk refuses, or what ``ref`` names makes another module than before.
    """
    function = Function.of(ref)
    plain = build(ref) if function is None else user_function.make(function, title=f"Model {function}")
    structure = structure_of(plain, model, whole=function is not None)
    held = named_tensors(model)
    tensors = {**model.state_dict(), **{name: held[name] for name in structure.extra}}
    path = folder.weights_file
    write_tensors(path, tensors, {"prunecli": __version__, "architecture": ref.name})
    exported = Exported(
        version=__version__,
        model=ref,
        structure=structure,
        weights_sha256=sha256_of(path),
        weights_bytes=path.stat().st_size,
        base=base,
        final=final,
    )
    hub = {
        "architecture": ref.name if ref.is_function else ref.name.partition(".")[0],
        "num_classes": ref.num_classes,
        "num_features": int(getattr(model, "num_features", 0)),
        "model_args": ref.args,
        "pretrained_cfg": ref.pretrained_cfg,
    }
    write_json(folder.config_file, {**hub, "prunecli": exported.model_dump(mode="json")})
    logits = reference_logits(model, ref)
    write_tensors(folder.reference_file, {"logits": logits})
    return structure


def load(path: str | Path, *, model: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The pruned model of a run folder, in eval mode on the CPU, bit-equal to the exported one.

    Only config.json and model.safetensors are read; the dense model is never run and nothing is unpickled. Nothing that
    the folder names is imported or called: a model that a function of the user's made needs that function again.

    Args:
        path: the run folder.
        model: makes the plain module that was pruned (``lambda: nets.tiny(width=16)``); not for models of timm.

    Raises:
        UsageError: there is no such folder; ``model`` is missing, fails, or is given for a model of timm.
        PruneError: the folder holds no model of ours, or a broken one.
    """
    loaded, _ = load_exported(path, model)
    return loaded


def load_exported(path: str | Path, function: Callable[[], object] | None = None) -> tuple[nn.Module, Exported]:
    """``load`` with the record beside the weights; a ``Function`` has to be the recorded one. Raises as ``load``."""
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{folder} does not exist or is no folder.")
    run = RunFolder(path=folder)
    if run.begun and not run.finished and not run.config_file.is_file():
        raise UsageError(f"{folder} holds an unfinished run, so there is no model yet.", hint="--resume continues it.")
    exported = read_config(folder)
    tensors = read_tensors(run.weights_file)
    if lost := sorted(set(exported.structure.extra) - set(tensors)):
        raise PruneError(f"{run.weights_file} lacks {lost[0]}, which {run.config_file.name} names.")
    model = _plain(folder, exported.model, function)
    try:
        shape_(model, exported.structure)
        fill_(model, tensors)
    except UnsupportedError as error:
        raise _misfit(folder, exported.model, error) from None
    return model.eval(), exported


def _plain(folder: Path, ref: ModelRef, function: Callable[[], object] | None) -> nn.Module:
    """The plain module of a folder that may be a stranger's: what it records is built by timm, or only compared.

    Raises UsageError where a function is needed and another one, or none, was given.
    """
    require_consent(folder, ref, function)
    if function is None:
        return build(ref)
    return user_function.make(function, title=f"Model {function}" if isinstance(function, Function) else "The function")


def require_consent(folder: Path, ref: ModelRef, function: Callable[[], object] | None) -> None:
    """Raises UsageError unless the user named the function that the exported model needs."""
    if not ref.is_function:
        if function is not None:
            raise UsageError(f"{folder} holds a model of timm, which no function makes.", hint="Leave --model out.")
        return
    recorded = Function(name=ref.name, args=ref.args)
    if function is None:
        raise UsageError(
            f"{folder} holds a model made by {str(recorded)!r}, which is not run unless you name it.",
            hint="If you trust that code: --model package.module:function with its --model-arg K=V, or in Python "
            "prunecli.load(DIR, model=FUNCTION).",
        )
    if isinstance(function, Function) and function != recorded:
        raise UsageError(f"{folder} holds a model made by {str(recorded)!r}, not by {str(function)!r}.")


def _misfit(folder: Path, ref: ModelRef, error: UnsupportedError) -> PruneError:
    if ref.is_function:
        return PruneError(f"{folder} does not fit the module that was made for it: {error.message}")
    return PruneError(
        f"{folder} does not fit {ref.name} of timm {version('timm')}: {error.message}",
        hint=f"It was made with timm {ref.timm}." if ref.timm != version("timm") else None,
    )


def read_config(folder: Path) -> Exported:
    """The ``prunecli`` record of config.json. Raises PruneError."""
    file = RunFolder(path=folder).config_file
    config = read_json(file)
    if not isinstance(config, dict) or "prunecli" not in config:
        raise PruneError(f"{file} is not from prunecli.", hint="`local-dir:PATH` loads plain timm folders.")
    try:
        return Exported.model_validate(config["prunecli"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PruneError(f"{file} is damaged at prunecli.{where}: {first['msg']}.") from None


def reference_input(size: tuple[int, int, int]) -> Tensor:
    """Two fixed images [2, C, H, W] with values in [-1, 1): integer arithmetic, so the same on every machine."""
    count = _VERIFY_IMAGES * size[0] * size[1] * size[2]
    hashed = (torch.arange(count, dtype=torch.int64) * 2654435761 + 40503) % 2**24
    return (hashed.to(torch.float32) / 2**23 - 1).reshape(_VERIFY_IMAGES, *size)


@torch.no_grad()
def reference_logits(model: nn.Module, ref: ModelRef) -> Tensor:
    """Logits of the reference input, or all features where there is no classifier.

    On one CPU thread, whose sums do not depend on how work was shared out.
    """
    cpu_model = model if next(model.parameters()).device.type == "cpu" else copy.deepcopy(model).cpu()
    was_training, threads = cpu_model.training, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        output = cpu_model.eval()(reference_input(input_spec(ref).size))
    finally:
        torch.set_num_threads(threads)
    cpu_model.train(was_training)
    return (logits_of(output) if ref.num_classes else as_rows(output, _VERIFY_IMAGES)).float()
