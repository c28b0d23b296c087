"""From a model's name to the module, and back from a recorded reference: everything that asks timm for a model.

``load_model`` resolves a timm name, ``hf-hub:owner/name`` or ``local-dir:PATH``, loads weights strictly and says where
they come from. ``build`` makes the plain module of a reference again without reading any weights. ``input_spec`` is the
checkpoint's own preprocessing. The papers' networks (``prunecli.models.paper_nets``) are registered by importing this
module.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import pickle
import re
import urllib.error
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import (
    filter_pretrained_cfg,
    get_arch_pretrained_cfgs,
    is_model,
    load_model_config_from_hf,
    split_model_name_tag,
)
from timm.models._hub import load_model_config_from_path  # the one public way to local-dir is create_model itself
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunecli.errors import PruneError, UsageError, nearest, one_line
from prunecli.models import paper_nets as _registered  # noqa: F401 - import registers the papers' networks
from prunecli.models import user_function
from prunecli.values.plan import ModelRef

log = logging.getLogger("prunecli")

TORCH_SUFFIXES = frozenset({".pth", ".pt", ".bin", ".tar", ".th", ".ckpt"})
EMA_KEYS = ("state_dict_ema", "model_ema")
PLAIN_KEYS = ("state_dict", "model")
WRAPPERS = ("module.", "_orig_mod.")
# huggingface_hub 1.x closes its client where a connection is refused, then tries again with the closed one
_CLOSED_CLIENT = "client has been closed"
_DEFAULT_SIZE = (3, 224, 224)  # as timm's, where nothing is known
OWN_ARGS = frozenset({"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"})


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What a model wants to see: images ``[*size]`` = channels, height, width, normalised by ``mean`` and ``std``."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready to prune: float32, on the CPU, in eval mode.

    ``digest`` is the SHA-256 over all tensors of its state_dict (name, type, shape, bytes, in name order). ``notes``
    say what a user should know about the weights (averaged ones were preferred, the classifier is new, …).
    """

    model: nn.Module
    ref: ModelRef
    digest: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A resolved name: what to hand to ``timm.create_model``; ``cfg`` is None where timm's registry knows it."""

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
        weights: a ``.safetensors`` or torch file to load instead of the weights that belong to ``name``.
        pretrained: False starts from random weights; ignored where ``weights`` is given.
        model_args: keyword arguments for ``timm.create_model``, or for the function.
        preprocessing: ``input_size``, ``mean`` and ``std`` that go before the checkpoint's own.
        seed: for whatever starts at random (all weights, or a classifier with another number of classes).

    Raises:
        UsageError: unknown name, file or argument; no weights to load; a function that fails.
        PruneError: a file that cannot be read, would execute code or holds another model; no network.
    """
    file = _existing_file(weights) if weights is not None else None
    given = _plain_args(model_args or {})
    if user_function.names_function(name):
        function = user_function.Function(name=name, args=given)
        return _load_function(function, file, pretrained=pretrained, preprocessing=preprocessing or {}, seed=seed)
    if own := sorted(OWN_ARGS & set(given)):
        raise UsageError(f"Model argument {own[0]!r} cannot be set.", hint="Weights are chosen by name or --weights.")
    source = _resolve(name)
    args = {**source.args, **given}
    overlay = {"pretrained_cfg_overlay": _tuples(preprocessing)} if preprocessing else {}
    with _naming_bad_args(name, given):
        plain = _create(source.name, source.cfg, args | overlay, initialise=False)
    ref = _reference(plain, args)
    notes: list[str] = []
    if ref.num_classes == 0:
        notes.append("the model has no classifier: what it returns are features, and their widths stay")
    if file is not None:
        model, state = plain, _read_state(file, notes)
        _load_strictly_(model, state, file=file, ref=ref)
    elif pretrained:
        _require_weights(name, plain.pretrained_cfg)  # type: ignore[arg-type]
        with _naming_download_failures(name), _tensors_only():
            model = _create(source.name, source.cfg, args | overlay, initialise=True, pretrained=True, seed=seed)
        if ref.num_classes not in {0, ref.pretrained_cfg["num_classes"]}:
            was = ref.pretrained_cfg["num_classes"]
            notes.append(f"the classifier is new and untrained: {ref.num_classes} classes, the checkpoint has {was}")
    else:
        model = _create(source.name, source.cfg, args | overlay, initialise=True, seed=seed)
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
        _load_strictly_(model, _read_state(file, notes), file=file, ref=ref)
    else:
        no_say = "" if pretrained else ", which --no-pretrained does not change"
        notes.append(f"the weights are those that {function.name} returns{no_say}")
    notes += _assumptions(ref, spec)
    return Loaded(model=model, ref=ref, digest=state_digest(model.state_dict()), notes=tuple(notes))


def _assumptions(ref: ModelRef, spec: InputSpec) -> list[str]:
    """What had to be taken for granted of a function's input, in one note or none."""
    assumed = [f"images of {'x'.join(map(str, spec.size))}"] if ref.assumes_input_size else []
    if not {"mean", "std"} <= ref.pretrained_cfg.keys():
        assumed.append("the mean and std of ImageNet")
    return [f"{ref.name} does not say what it takes; assumed: {', '.join(assumed)}"] if assumed else []


def build(ref: ModelRef) -> nn.Module:
    """The plain timm module of a reference, on the CPU, in eval mode, without loading or initialising weights.

    Parameter values are undefined (memory as the allocator hands it out); buffers hold what timm's constructor
    computes.

    Raises:
        PruneError: the installed timm does not know the architecture or its arguments.
    """
    args = {"num_classes": ref.num_classes, **ref.args}
    arch = split_model_name_tag(ref.name)[0]
    if own := sorted(OWN_ARGS & set(args)):
        raise PruneError(f"The reference of {ref.name} sets {own[0]!r}, which could read files; refused.")
    if not is_model(arch):
        raise PruneError(
            f"The installed timm {timm.__version__} does not know {arch!r}.",
            hint=f"The model was built with {ref.timm}.",
        )
    try:
        return _create(arch if ref.pretrained_cfg else ref.name, ref.pretrained_cfg or None, args, initialise=False)
    except (TypeError, ValueError, AssertionError) as error:
        raise PruneError(
            f"timm {timm.__version__} cannot build {ref.name} with {args}: {one_line(error)}.",
            hint=f"The model was built with timm {ref.timm}.",
        ) from error


def input_spec(ref: ModelRef) -> InputSpec:
    """The preprocessing of a reference: timm's ``resolve_data_config`` on its pretrained_cfg, ``in_chans`` and
    ``img_size`` arguments applied. Where the channels change, ``mean`` and ``std`` become their average over channels.
    """
    known = ref.pretrained_cfg or ({} if ref.is_function else timm.get_pretrained_cfg(ref.name).to_dict())
    cfg = resolve_data_config(pretrained_cfg={"input_size": _DEFAULT_SIZE, **_tuples(known)})
    channels, height, width = cfg["input_size"]
    channels = ref.args.get("in_chans", channels)
    if (size := ref.args.get("img_size")) is not None:
        height, width = (size, size) if isinstance(size, int) else size
    return InputSpec(
        size=(channels, height, width),
        mean=_per_channel(cfg["mean"], channels),
        std=_per_channel(cfg["std"], channels),
        interpolation=cfg["interpolation"],
        crop_pct=cfg["crop_pct"],
        crop_mode=cfg["crop_mode"],
    )


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- names


def _resolve(name: str) -> _Source:
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
    return _Source(name=name, cfg=None, args={})


def _from_folder(name: str, folder: Path) -> _Source:
    if not folder.is_dir():
        raise UsageError(f"Folder {folder} does not exist.")
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PruneError(f"{folder / 'config.json'} cannot be read: {one_line(error)}.") from error
    if not isinstance(raw, dict) or "architecture" not in raw:
        raise PruneError(f"{folder / 'config.json'} names no architecture, so it is not timm's layout.")
    return _from_config(name, *load_model_config_from_path(folder))


def _from_config(name: str, cfg: dict[str, Any], arch: str, args: dict[str, Any]) -> _Source:
    if not is_model(arch):
        raise PruneError(
            f"The config of {name} names the architecture {arch!r}, which timm {timm.__version__} does not know.",
            hint=nearest(arch, timm.list_models()),
        )
    return _Source(name=arch, cfg=cfg, args=dict(args))


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


# ---------------------------------------------------------------------------------------------- building


class _SkipInit(TorchFunctionMode):
    """While active, in-place writes that initialise a parameter do nothing; buffers are computed as ever.

    Building vit_base takes 0.01 s instead of 0.9 s. The meta device would save no more, and would lose the values of
    the buffers that are in no state_dict (position tables, attention masks).
    """

    SKIPPED = frozenset(
        {"uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"}
        | {"xavier_normal_", "orthogonal_", "constant_", "ones_", "zeros_", "zero_", "fill_"}
        | {"erfinv_", "mul_", "add_", "clamp_"}  # the steps of a truncated normal
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor")
        if isinstance(first, nn.Parameter) and getattr(func, "__name__", "") in self.SKIPPED:
            return first
        return func(*args, **kwargs)


def _create(
    name: str,
    cfg: Mapping[str, Any] | None,
    args: Mapping[str, Any],
    *,
    initialise: bool,
    pretrained: bool = False,
    seed: int = 0,
) -> nn.Module:
    """``timm.create_model`` that leaves the caller's random state alone."""
    with torch.random.fork_rng(devices=[]), contextlib.nullcontext() if initialise else _SkipInit():
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(
            name, pretrained=pretrained, pretrained_cfg=_tuples(cfg) if cfg else None, **_tuples(args)
        )
    return model.eval()


def _require_weights(name: str, cfg: Mapping[str, Any]) -> None:
    """Raises UsageError where a model's pretrained_cfg points at no weights, or at a local file that is not there."""
    if not any(cfg.get(key) for key in ("url", "file", "hf_hub_id")):
        known = timm.list_pretrained(f"{cfg['architecture']}.*")
        also = f" With weights: {', '.join(known)}." if known else ""
        raise UsageError(
            f"Model {name!r} has no pretrained weights.", hint=f"Give --weights FILE or --no-pretrained.{also}"
        )
    if (file := cfg.get("file")) and not Path(file).exists():
        raise UsageError(f"The weights of {name!r} are missing: {file} does not exist.", hint="Give --weights FILE.")


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Makes every ``torch.load`` refuse code, also those in timm: older versions read local files without that."""
    force, forbid = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, forbid)}
    os.environ[force] = "1"
    try:
        yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextlib.contextmanager
def _naming_download_failures(name: str) -> Iterator[None]:
    """Turns what timm and the hub client raise while they fetch and load a model into one sentence each."""
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
        raise _explain_unreadable(f"The weights of {name!r}", error) from error


def _unreachable(name: str) -> PruneError:
    return PruneError(
        f"Model {name!r} is not on this machine and its server cannot be reached.",
        hint="Check the network, or give --weights FILE with a copy of the weights.",
    )


# ---------------------------------------------------------------------------------------------- weight files


def _existing_file(path: str | Path) -> Path:
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


def _read_state(file: Path, notes: list[str]) -> dict[str, Tensor]:
    """Names to tensors of a weights file, wrappers taken off. Nothing in the file is executed."""
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
        raise _explain_unreadable(str(file), error) from error
    return _unwrapped(content, file, notes)


def _explain_unreadable(what: str, error: BaseException) -> PruneError:
    """Why a torch file could not be read: it asks for code, it holds another model, or its bytes are broken."""
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
    reason = "" if isinstance(error, KeyError) else f" ({one_line(error)})"  # a KeyError says "101"
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


def _load_strictly_(model: nn.Module, state: Mapping[str, Tensor], *, file: Path, ref: ModelRef) -> None:
    """Every tensor of the model is in the file with its shape, and nothing else is; only BatchNorm's counters may lack.

    Raises:
        PruneError: names the first tensors that do not fit.
    """
    own = model.state_dict(keep_vars=True)
    given = {id(own[n]) for n in own if n in state}  # a shared tensor needs to be there under one of its names
    missing = [n for n in own if id(own[n]) not in given and not n.endswith("num_batches_tracked")]
    extra = [n for n in state if n not in own]
    other = [n for n in state if n in own and state[n].shape != own[n].shape]
    problems = [
        _listed(missing, "missing", lambda n: n),
        _listed(extra, "unknown", lambda n: n),
        _listed(other, "of another shape", lambda n: f"{n} is {_dims(state[n])}, the model's is {_dims(own[n])}"),
    ]
    if found := "; ".join(p for p in problems if p):
        hint = None if missing or extra else _class_count_hint(other, state, ref)
        raise PruneError(f"{file} does not fit {ref.name}: {found}.", hint=hint)
    model.load_state_dict(dict(state), strict=False)


def _class_count_hint(other: list[str], state: Mapping[str, Tensor], ref: ModelRef) -> str | None:
    """Says which class count would fit, where the classifier is the only thing that differs."""
    named = ref.pretrained_cfg.get("classifier") or ()
    heads = (named,) if isinstance(named, str) else tuple(named)
    if not all(name.rpartition(".")[0] in heads for name in other):
        return None
    return f"Only the classifier differs; give --model-arg num_classes={state[other[0]].shape[0]}."


def _listed(names: list[str], what: str, show: Callable[[str], str]) -> str:
    more = ", …" if len(names) > 3 else ""
    return f"{len(names)} {what} ({', '.join(map(show, names[:3]))}{more})" if names else ""


def _dims(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


# ---------------------------------------------------------------------------------------------- small values


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; timm's own configs and arguments do."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels
