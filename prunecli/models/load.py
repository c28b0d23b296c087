"""Loading a model by name, with its weights: timm names, the hub, local folders and functions of the user's own.

``load_model`` resolves the name, loads weights strictly and records where they come from. How the plain module of a
reference is built again without reading any weights is ``prunecli.models.build``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import urllib.error
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from timm.models import (
    filter_pretrained_cfg,
    get_arch_pretrained_cfgs,
    is_model,
    load_model_config_from_hf,
    split_model_name_tag,
)
from timm.models._hub import load_model_config_from_path  # the one public way to local-dir is create_model itself
from torch import nn

from prunecli.errors import PruneError, UsageError, nearest, one_line
from prunecli.models import user_function
from prunecli.models.build import OWN_ARGS, InputSpec, create, input_spec, tuples
from prunecli.models.tensors import state_digest
from prunecli.models.weights import existing_file, explain_unreadable, load_strictly_, read_state, tensors_only
from prunecli.values.plan import ModelRef

log = logging.getLogger("prunecli")
# huggingface_hub 1.x closes its client where a connection is refused, then tries again with the closed one
_CLOSED_CLIENT = "client has been closed"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready to prune: float32, on the CPU, in eval mode.

    Attributes:
        model: the module.
        ref: reference to build the module from again.
        digest: SHA-256 over all tensors of its state_dict (name, type, shape, bytes, in name order).
        notes: sentences a user should read about the weights (averaged ones were preferred, the classifier is new, …).
    """

    model: nn.Module
    ref: ModelRef
    digest: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Resolved:
    """A resolved name: what to hand to ``timm.create_model``; ``cfg`` is ``None`` where timm's registry has it."""

    name: str
    cfg: dict[str, Any] | None
    args: dict[str, Any]


def load_model(
    name: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    model_args: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Loaded:
    """Build a model and load its weights, strictly.

    Args:
        name: timm name with or without tag, ``hf-hub:owner/name[@revision]``, ``local-dir:PATH``, or
            ``package.module:function``, which is imported and called.
        weights: ``.safetensors`` or torch file to load instead of the weights that belong to ``name``.
        pretrained: ``False`` for random weights; ignored where ``weights`` is given.
        model_args: keyword arguments for ``timm.create_model``, or for the function.
        preprocessing: ``input_size``, ``mean`` and ``std`` that replace the checkpoint's own.
        seed: seed for whatever starts at random (all weights, or a classifier with another number of classes).

    Raises:
        UsageError: unknown name, file or argument; no weights to load; a function that fails.
        PruneError: a file that cannot be read, would execute code or holds another model; no network.
    """
    file = existing_file(weights) if weights is not None else None
    given = _plain_args(model_args or {})
    if user_function.names_function(name):
        function = user_function.Function(name=name, args=given)
        return _load_function(function, file, pretrained=pretrained, preprocessing=preprocessing or {}, seed=seed)
    if own := sorted(OWN_ARGS & set(given)):
        raise UsageError(f"Model argument {own[0]!r} cannot be set.", hint="Weights are chosen by name or --weights.")
    source = _resolve(name)
    args = {**source.args, **given}
    overlay = {"pretrained_cfg_overlay": tuples(preprocessing)} if preprocessing else {}
    with _naming_bad_args(name, given):
        plain = create(source.name, source.cfg, args | overlay, initialise=False)
    ref = _reference(plain, args)
    notes: list[str] = []
    if ref.num_classes == 0:
        notes.append("the model has no classifier: what it returns are features, and their widths stay")
    if file is not None:
        model, state = plain, read_state(file, notes)
        load_strictly_(model, state, file=file, ref=ref)
    elif pretrained:
        _require_weights(name, plain.pretrained_cfg)  # type: ignore[arg-type]
        with _naming_download_failures(name), tensors_only():
            model = create(source.name, source.cfg, args | overlay, initialise=True, pretrained=True, seed=seed)
        if ref.num_classes not in {0, ref.pretrained_cfg["num_classes"]}:
            was = ref.pretrained_cfg["num_classes"]
            notes.append(f"the classifier is new and untrained: {ref.num_classes} classes, the checkpoint has {was}")
    else:
        model = create(source.name, source.cfg, args | overlay, initialise=True, seed=seed)
        notes.append("random weights, nothing pretrained")
    return Loaded(model=model, ref=ref, digest=state_digest(model.state_dict()), notes=tuple(notes))


def _load_function(
    function: user_function.Function,
    file: Path | None,
    *,
    pretrained: bool,
    preprocessing: Mapping[str, Any],
    seed: int,
) -> Loaded:
    """A model of the user's own, with the weights it comes with or those of ``file``. Raises as ``load_model``."""
    title = f"Model {function}"
    notes: list[str] = []
    model = user_function.make(function, title=title, seed=seed, notes=notes)
    cfg = {**user_function.declared_input(model), **preprocessing}
    ref = ModelRef(
        name=function.name, args=dict(function.args), num_classes=0, pretrained_cfg=cfg, timm=timm.__version__
    )
    spec = input_spec(ref)
    ref = ref.model_copy(update={"num_classes": user_function.count_classes(model, spec.size, title=title)})
    if file is not None:
        load_strictly_(model, read_state(file, notes), file=file, ref=ref)
    else:
        unchanged = "" if pretrained else ", which --no-pretrained does not change"
        notes.append(f"the weights are those that {function.name} returns{unchanged}")
    notes += _assumptions(ref, spec)
    return Loaded(model=model, ref=ref, digest=state_digest(model.state_dict()), notes=tuple(notes))


def _assumptions(ref: ModelRef, spec: InputSpec) -> list[str]:
    """One note on what a function's model does not declare about its images; empty where it declares all."""
    assumed = [f"images of {'x'.join(map(str, spec.size))}"] if ref.assumes_input_size else []
    if not {"mean", "std"} <= ref.pretrained_cfg.keys():
        assumed.append("the mean and std of ImageNet")
    return [f"{ref.name} does not say what it takes; assumed: {', '.join(assumed)}"] if assumed else []


# ---------------------------------------------------------------------------------------------- names


def _resolve(name: str) -> _Resolved:
    prefix, colon, rest = name.partition(":")
    if colon and prefix in ("hf-hub", "hf_hub"):
        with _naming_download_failures(name):
            return _from_config(name, *load_model_config_from_hf(rest))
    if colon and prefix == "local-dir":
        return _from_folder(name, Path(rest))
    if colon or "/" in name or os.sep in name:
        raise UsageError(f"Unknown model {name!r}.", hint=f"Write hf-hub:{name} or local-dir:{name} for these sources.")
    arch, tag = split_model_name_tag(name)
    if not is_model(arch):
        raise UsageError(f"Unknown model {name!r}.", hint=nearest(arch, timm.list_models()))
    tags = get_arch_pretrained_cfgs(arch)
    if tag and name not in tags:
        raise UsageError(f"Unknown model {name!r}: {arch} has no weights tagged {tag!r}.", hint=nearest(name, tags))
    return _Resolved(name=name, cfg=None, args={})


def _from_folder(name: str, folder: Path) -> _Resolved:
    if not folder.is_dir():
        raise UsageError(f"Folder {folder} does not exist.")
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PruneError(f"{folder / 'config.json'} cannot be read: {one_line(error)}.") from error
    if not isinstance(raw, dict) or "architecture" not in raw:
        raise PruneError(f"{folder / 'config.json'} names no architecture, so it is not timm's layout.")
    return _from_config(name, *load_model_config_from_path(folder))


def _from_config(name: str, cfg: dict[str, Any], arch: str, args: dict[str, Any]) -> _Resolved:
    if not is_model(arch):
        raise PruneError(
            f"The config of {name} names the architecture {arch!r}, which timm {timm.__version__} does not know.",
            hint=nearest(arch, timm.list_models()),
        )
    return _Resolved(name=arch, cfg=cfg, args=dict(args))


def _plain_args(args: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(args)))
    except TypeError as error:
        raise UsageError(f"Model arguments must be plain values that JSON can hold: {error}.") from None
    return plain


@contextlib.contextmanager
def _naming_bad_args(name: str, args: Mapping[str, Any]) -> Iterator[None]:
    """A constructor that fails is the user's doing only where the user gave arguments; else it is passed on."""
    try:
        yield
    except (TypeError, ValueError, AssertionError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        if not args:
            raise
        given = ", ".join(f"{key}={value}" for key, value in args.items())
        raise UsageError(f"Model {name!r} cannot be built with {given}: {one_line(error)}.") from error


def _reference(model: nn.Module, args: Mapping[str, Any]) -> ModelRef:
    """The reference of a built model, reduced to JSON values: no download locations, no tensors."""
    full: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    reduced = filter_pretrained_cfg(full, remove_source=True)
    cfg = {key: value for key, value in reduced.items() if key not in ("state_dict", "custom_load")}
    tag = cfg.get("tag")
    return ModelRef(
        name=f"{cfg['architecture']}.{tag}" if tag else cfg["architecture"],
        args=dict(args),
        num_classes=int(getattr(model, "num_classes", 0) or 0),  # a feature extractor has none
        pretrained_cfg=json.loads(json.dumps(cfg)),
        timm=timm.__version__,
    )


def _require_weights(name: str, cfg: Mapping[str, Any]) -> None:
    """Raise UsageError where a model's pretrained_cfg points at no weights, or at a local file that is not there."""
    if not any(cfg.get(key) for key in ("url", "file", "hf_hub_id")):
        known = timm.list_pretrained(f"{cfg['architecture']}.*")
        also = f" With weights: {', '.join(known)}." if known else ""
        raise UsageError(
            f"Model {name!r} has no pretrained weights.", hint=f"Give --weights FILE or --no-pretrained.{also}"
        )
    if (file := cfg.get("file")) and not Path(file).exists():
        raise UsageError(f"The weights of {name!r} are missing: {file} does not exist.", hint="Give --weights FILE.")


@contextlib.contextmanager
def _naming_download_failures(name: str) -> Iterator[None]:
    """Turn what timm and the hub client raise while they fetch and load a model into one sentence each."""
    try:
        yield
    except hub.HFValidationError as error:
        raise UsageError(f"{name!r} is not a hub repository: {one_line(error)}.", hint="Write owner/name.") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, urllib.error.URLError, ConnectionError) as error:
        raise _unreachable(name) from error
    except hub.GatedRepoError as error:
        raise PruneError(f"{name!r} is gated.", hint="Log in with `hf auth login` and accept its terms.") from error
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        raise UsageError(f"{name!r} does not exist on the hub, or is private.", hint="Check the spelling.") from error
    except hub.EntryNotFoundError as error:
        raise PruneError(f"{name!r} lacks a file that timm needs: {one_line(error)}.") from error
    except SafetensorError as error:
        raise PruneError(f"The weights of {name!r} are damaged or truncated: {one_line(error)}.") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError) as error:
        if _CLOSED_CLIENT in str(error):
            raise _unreachable(name) from error
        raise explain_unreadable(f"The weights of {name!r}", error) from error


def _unreachable(name: str) -> PruneError:
    return PruneError(
        f"Model {name!r} is not on this machine and its server cannot be reached.",
        hint="Check the network, or give --weights FILE with a copy of the weights.",
    )
