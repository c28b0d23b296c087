"""Loading: names, files and their mistakes; building without weights; the checkpoint's preprocessing."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import _registry as registry
from torch import Tensor, nn

from prunecli.errors import PruneError, UsageError
from prunecli.models.build import build, input_spec
from prunecli.models.load import load_model
from prunecli.models.tensors import state_digest
from prunecli.values.plan import ModelRef

SMALL = "mlp7_relu"  # 154,010 parameters: quick to write and read


def plain_state(name: str = SMALL, **kwargs: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return timm.create_model(name, **kwargs).state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnt50", "resnet50"),
        ("cifar_resnet57", "cifar_resnet56"),
        ("resnet50.a1_in1kk", "resnet50.a1_in1k"),
        ("timm/resnet50.a1_in1k", "hf-hub:timm/resnet50.a1_in1k"),
        ("s3:bucket/key", "hf-hub:s3:bucket/key"),
    ],
)
def test_unknown_name_gets_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        load_model(name)
    assert name in error.value.message
    assert hint in (error.value.hint or "")


def test_a_name_without_weights_says_what_to_give() -> None:
    with pytest.raises(UsageError, match="no pretrained weights") as error:
        load_model("cifar_resnet20")
    assert "--weights FILE or --no-pretrained" in str(error.value)
    assert "cifar_resnet20.digits" in str(error.value)


@pytest.fixture
def digits_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The digits tag points at this file."""
    file, name = tmp_path / "digits.safetensors", "cifar_resnet20.digits"
    cfg = dataclasses.replace(timm.get_pretrained_cfg(name), file=str(file))
    monkeypatch.setitem(registry._model_pretrained_cfgs, name, cfg)
    return file


def test_a_shipped_weights_file_that_is_gone_is_named(digits_file: Path) -> None:
    with pytest.raises(UsageError, match=r"digits\.safetensors does not exist"):
        load_model("cifar_resnet20.digits")


def test_a_shipped_weights_file_is_loaded(digits_file: Path) -> None:
    state = plain_state("cifar_resnet20")
    save_file(state, digits_file)
    loaded = load_model("cifar_resnet20.digits")
    assert same(loaded.model.state_dict(), state)
    assert loaded.ref.name == "cifar_resnet20.digits"
    assert input_spec(loaded.ref).size == (3, 16, 16)


def test_default_tag_is_resolved() -> None:
    assert load_model("resnet18", pretrained=False).ref.name == "resnet18.a1_in1k"


def test_random_weights_follow_the_seed_and_leave_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    a, b, c = (load_model(SMALL, pretrained=False, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert a.digest == b.digest != c.digest
    assert not a.model.training
    assert {p.dtype for p in a.model.parameters()} == {torch.float32}
    assert "random weights" in a.notes[0]


@pytest.mark.parametrize("args", [{"num_classes": 0}, {"features_only": True}])
def test_a_model_without_classifier_says_so(args: dict[str, Any]) -> None:
    loaded = load_model("resnet18", pretrained=False, model_args=args)
    assert loaded.ref.num_classes == 0
    assert "the model has no classifier" in loaded.notes[0]
    assert {name: p.shape for name, p in build(loaded.ref).named_parameters()} == {
        name: p.shape for name, p in loaded.model.named_parameters()
    }


@pytest.mark.parametrize(
    "args", [{"nonsense": 1}, {"num_classes": "ten"}, {"pretrained_cfg": {}}, {"num_classes": object()}]
)
def test_wrong_model_args_are_usage_errors(args: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        load_model("cifar_resnet20", pretrained=False, model_args=args)
    assert "rgument" in error.value.message or next(iter(args)) in error.value.message


# ---------------------------------------------------------------------------------------------- weight files


def test_published_checkpoint(shared_data: Path) -> None:
    loaded = load_model("cifar_resnet56", weights=shared_data / "checkpoints" / "cifar10_resnet56.safetensors")
    assert sum(p.numel() for p in loaded.model.parameters()) == 853_018
    assert loaded.ref == ModelRef(
        name="cifar_resnet56",
        num_classes=10,
        pretrained_cfg=loaded.ref.pretrained_cfg,
        timm=timm.__version__,
    )
    assert loaded.notes == ()


WRAPPINGS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str | None]] = {
    "plain": (lambda s: s, None),
    "state_dict": (lambda s: {"epoch": 3, "state_dict": s, "args": Namespace(lr=0.1)}, None),
    "model": (lambda s: {"model": s, "optimizer": {"lr": 1.0}}, None),
    "ddp": (lambda s: {f"module.{k}": v for k, v in s.items()}, None),
    "compiled ddp": (lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}}, None),
    "ema": (lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "state_dict_ema": s}, "state_dict_ema"),
    "averaged": (
        lambda s: {"model": {}, "model_ema": {"n_averaged": torch.tensor(3), **{f"module.{k}": s[k] for k in s}}},
        "model_ema",
    ),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("ending", [".pth", ".pth.tar", ".bin", ".pt"])
def test_torch_files(tmp_path: Path, wrapping: str, ending: str) -> None:
    wrap, said = WRAPPINGS[wrapping]
    state = plain_state()
    file = tmp_path / f"weights{ending}"
    torch.save(wrap(state), file, _use_new_zipfile_serialization=ending != ".pt")
    loaded = load_model(SMALL, weights=file)
    assert same(loaded.model.state_dict(), state)
    assert loaded.digest == state_digest(state)
    assert (said is None and loaded.notes == ()) or (said is not None and said in loaded.notes[0])


def test_digest_sees_names_shapes_types_and_values() -> None:
    a = {"x": torch.zeros(2, 3), "n": torch.tensor(1)}
    changed = [
        {"y": a["x"], "n": a["n"]},
        {"x": torch.zeros(3, 2), "n": a["n"]},
        {"x": torch.zeros(2, 3).bfloat16(), "n": a["n"]},
        {"x": torch.zeros(2, 3).index_fill(0, torch.tensor(0), 1e-30), "n": a["n"]},
        {"x": a["x"], "n": torch.tensor(2)},
    ]
    assert len({state_digest(s) for s in [a, *changed]}) == 6
    assert state_digest(dict(reversed(a.items()))) == state_digest(a)


def test_num_batches_tracked_may_be_missing_nothing_else(tmp_path: Path) -> None:
    state = plain_state("cifar_resnet20")
    save_file({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "a.safetensors")
    assert load_model("cifar_resnet20", weights=tmp_path / "a.safetensors").model.bn1.num_batches_tracked == 0
    save_file({k: v for k, v in state.items() if k != "layer1.0.bn1.running_var"}, tmp_path / "b.safetensors")
    with pytest.raises(PruneError, match=r"1 missing \(layer1\.0\.bn1\.running_var\)") as error:
        load_model("cifar_resnet20", weights=tmp_path / "b.safetensors")
    assert error.value.exit_code == 1


def test_another_architecture_is_named_with_keys_and_shapes(tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save(plain_state("lenet5_relu"), file)
    with pytest.raises(PruneError) as error:
        load_model(SMALL, weights=file)
    assert (error.value.exit_code, error.value.hint) == (1, None)
    for part in ("other.pth does not fit mlp7_relu", "14 missing (layers.0.weight", "10 unknown (conv1.weight"):
        assert part in error.value.message
    torch.save(plain_state("mlp7_relu", in_chans=2), file)
    with pytest.raises(PruneError, match=r"\(layers\.0\.weight is 100x2048, the model's is 100x1024\)"):
        load_model(SMALL, weights=file)


def test_another_class_count_is_hinted_and_the_hint_works(tmp_path: Path) -> None:
    file = tmp_path / "c7.pth"
    torch.save(plain_state(num_classes=7), file)
    with pytest.raises(PruneError, match=r"head\.weight is 7x100, the model's is 10x100") as error:
        load_model(SMALL, weights=file)
    assert "--model-arg num_classes=7" in str(error.value)
    loaded = load_model(SMALL, weights=file, model_args={"num_classes": 7})
    assert (loaded.ref.num_classes, loaded.ref.args) == (7, {"num_classes": 7})
    assert build(loaded.ref)(torch.zeros(1, 1, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("name", ["gone.pth", "gone.safetensors"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} does not exist"):
        load_model(SMALL, weights=tmp_path / name)


def test_unknown_ending_and_folder(tmp_path: Path) -> None:
    (tmp_path / "w.npz").touch()
    with pytest.raises(UsageError, match=r"unknown ending '\.npz'"):
        load_model(SMALL, weights=tmp_path / "w.npz")
    with pytest.raises(PruneError, match="not a file"):
        load_model(SMALL, weights=tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_truncated_files(tmp_path: Path, form: str, share: float) -> None:
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(plain_state(), file)
    else:
        torch.save(plain_state(), file, _use_new_zipfile_serialization=form == "zip")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(PruneError, match="damaged, truncated or no") as error:
        load_model(SMALL, weights=file)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"a": 1}}, {}])
def test_torch_file_without_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(PruneError, match="holds no state_dict"):
        load_model(SMALL, weights=tmp_path / "w.pth")


class Bomb:
    """Unpickling this would touch a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "bin in a folder"])
def test_a_pickle_that_would_execute_code_is_refused_and_nothing_runs(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # asks torch for the unsafe reader
    target = tmp_path / "executed"
    content = {"state_dict": plain_state(), "extra": Bomb(target)}
    name, file = SMALL, tmp_path / "bomb.pth"
    if form == "bin in a folder":
        name, file = f"local-dir:{tmp_path}", tmp_path / "pytorch_model.bin"
        (tmp_path / "config.json").write_text(json.dumps({"architecture": SMALL, "num_classes": 10}))
    if form == "bare pickle":
        file.write_bytes(pickle.dumps({"weights": Bomb(target)}))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(PruneError) as error:
        load_model(name, weights=None if name != SMALL else file)
    assert error.value.exit_code == 1
    assert "refused" in error.value.message
    assert ("system" if form != "bare pickle" else "more than tensors") in error.value.message
    assert not target.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    monkeypatch.undo()

    # the same file really is dangerous: the unsafe reader runs it
    if form == "bare pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert target.exists()


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(PruneError, match=r"refused.*torch\.nn\.modules\.linear\.Linear") as error:
        load_model(SMALL, weights=tmp_path / "module.pth")
    assert "state_dict" in str(error.value)


# ---------------------------------------------------------------------------------------------- folders and hub


def write_folder(folder: Path, state: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    size = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.25], "tag": "mine", "classifier": "head"}
    values = {"architecture": SMALL, "num_classes": 7, "pretrained_cfg": size, **config}
    (folder / "config.json").write_text(json.dumps(values))
    save_file(state, folder / "model.safetensors")
    return folder


def test_local_folder(tmp_path: Path) -> None:
    state = plain_state(num_classes=7)
    folder = write_folder(tmp_path / "m", state)
    loaded = load_model(f"local-dir:{folder}")
    assert same(loaded.model.state_dict(), state)
    assert (loaded.ref.name, loaded.ref.num_classes, loaded.ref.args) == ("mlp7_relu.mine", 7, {})
    assert not {"file", "source", "hf_hub_id", "url"} & set(loaded.ref.pretrained_cfg)
    assert (input_spec(loaded.ref).mean, input_spec(loaded.ref).std) == ((0.5,), (0.25,))

    fresh = load_model(f"local-dir:{folder}", model_args={"num_classes": 3})
    assert (fresh.ref.num_classes, fresh.model.head.out_features) == (3, 3)
    assert torch.equal(fresh.model.layers[0].weight, state["layers.0.weight"])
    assert "classifier is new" in fresh.notes[0]


def test_stored_model_args_of_a_folder_are_kept(tmp_path: Path) -> None:
    state = plain_state(num_classes=7, in_chans=2)
    folder = write_folder(tmp_path / "m", state, model_args={"in_chans": 2})
    loaded = load_model(f"local-dir:{folder}")
    assert loaded.ref.args == {"in_chans": 2}
    assert input_spec(loaded.ref).size == (2, 32, 32)
    assert same(load_model(f"local-dir:{folder}").model.state_dict(), state)


def test_folder_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_model(f"local-dir:{tmp_path / 'gone'}")
    with pytest.raises(PruneError, match=r"config\.json cannot be read") as error:
        load_model(f"local-dir:{tmp_path}")
    assert error.value.exit_code == 1
    for text in ("{", "[]", '{"num_classes": 3}', '{"architecture": "mlp7_rellu"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(PruneError, match=r"config"):
            load_model(f"local-dir:{tmp_path}")
    folder = write_folder(tmp_path / "wrong", plain_state("lenet5_relu", num_classes=7))
    with pytest.raises(PruneError, match="do not fit the architecture"):
        load_model(f"local-dir:{folder}")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PruneError, match="damaged or truncated"):
        load_model(f"local-dir:{folder}")
    weights.unlink()
    with pytest.raises(PruneError, match="No suitable checkpoints"):
        load_model(f"local-dir:{folder}")


class HubHandler(http.server.SimpleHTTPRequestHandler):
    """A stand-in for the hub: ``/owner/name/resolve/main/FILE`` from a folder, with the headers its client needs."""

    def send_head(self) -> Any:
        if self.path == "/stop":  # from now on nobody listens here
            self.send_response(200)
            self.end_headers()
            threading.Thread(target=lambda: (self.server.shutdown(), self.server.server_close())).start()
            return None
        owner, name, _, _, file = self.path.split("?")[0].strip("/").split("/", 4)
        repo = Path(self.directory) / owner / name
        if not (repo / file).is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if repo.is_dir() else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        self.send_response(200)
        self.send_header("ETag", f'"{state_digest({"x": torch.tensor(list((repo / file).read_bytes()[:64]))})}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str((repo / file).stat().st_size))
        self.end_headers()
        return (repo / file).open("rb")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "hub"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *a, **k: HubHandler(*a, directory=str(folder), **k)
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()
    thread.join()


HUB_SCRIPT = """
import sys, time, urllib.request
from prunecli.errors import PruneError
from prunecli.models.load import load_model
for name in sys.argv[2:]:
    if name == "stop":
        urllib.request.urlopen(sys.argv[1] + "/stop").read()
        time.sleep(1)
        time.sleep = lambda seconds: None  # the hub client's pauses between its retries
        continue
    try:
        loaded = load_model(name)
        print("ok", loaded.ref.name, loaded.digest)
    except PruneError as error:
        print(int(error.exit_code), error)
"""


@pytest.mark.slow
def test_hub_model_its_failures_and_the_cache(hub: tuple[str, Path], tmp_path: Path) -> None:
    endpoint, folder = hub
    state = plain_state(num_classes=7)
    write_folder(folder / "me" / "good", state)
    broken = write_folder(folder / "me" / "broken", state) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:5000])
    (write_folder(folder / "me" / "empty", state) / "model.safetensors").unlink()

    # the client reads its endpoint when it is imported, so this takes a process of its own
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"PYTHONPATH": str(Path(__file__).parents[2]), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    names = ["hf-hub:me/good", "hf-hub:me/broken", "hf-hub:me/empty", "hf-hub:me/gone", "hf-hub:a/b/c"]
    names += ["stop", "hf-hub:me/good", "hf-hub:me/other"]
    command = [sys.executable, "-c", HUB_SCRIPT, endpoint, *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)

    good, truncated, empty, gone, invalid, cached, unreachable = done.stdout.splitlines()
    assert good == f"ok mlp7_relu.mine {state_digest(state)}"
    for said, code, words in [
        (truncated, 1, "damaged or truncated"),
        (empty, 1, "lacks a file"),
        (gone, 2, "does not exist on the hub"),
        (invalid, 2, "not a hub repository"),
        (unreachable, 1, "cannot be reached"),
    ]:
        assert said.startswith(f"{code} ")
        assert words in said
    assert cached == good


def test_a_client_that_closed_itself_is_an_unreachable_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_name: str) -> None:
        raise RuntimeError("Cannot send a request, as the client has been closed.")  # as httpx says it to hub 1.x

    monkeypatch.setattr("prunecli.models.load.load_model_config_from_hf", refused)
    with pytest.raises(PruneError, match="cannot be reached"):
        load_model("hf-hub:me/other")


# ---------------------------------------------------------------------------------------------- build


@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny_patch4_window7_224",
        "vit_tiny_patch16_224",
        "levit_128s",
        "convnext_atto",
        "eva02_tiny_patch14_336",
        "maxvit_rmlp_pico_rw_256",
        "cifar_resnet20",
    ],
)
def test_build_has_all_buffers_right_and_takes_the_weights(name: str) -> None:
    loaded = load_model(name, pretrained=False, seed=5)
    shell = build(ModelRef.model_validate_json(loaded.ref.model_dump_json()))
    ours, theirs = dict(shell.named_buffers()), dict(loaded.model.named_buffers())
    assert ours.keys() == theirs.keys()
    for buffer, value in theirs.items():
        assert torch.equal(ours[buffer], value), buffer
    shell.load_state_dict(loaded.model.state_dict(), strict=True)
    x = torch.randn(1, *input_spec(loaded.ref).size)
    with torch.no_grad():
        assert torch.equal(shell(x), loaded.model(x))
    assert not shell.training


def test_build_initialises_nothing_and_leaves_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("initialised")

    before = torch.random.get_rng_state()
    ref = load_model(SMALL, pretrained=False).ref
    monkeypatch.setattr(nn.init, "_no_grad_uniform_", refuse)
    monkeypatch.setattr(Tensor, "uniform_", refuse)
    build(ref)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(AssertionError, match="initialised"):
        timm.create_model(SMALL)


def test_build_of_an_unknown_architecture() -> None:
    ref = ModelRef(name="resnet9000.x", num_classes=10, timm="9.9")
    with pytest.raises(PruneError, match="does not know 'resnet9000'") as error:
        build(ref)
    assert "9.9" in str(error.value)
    wrong = ModelRef(name="resnet18", num_classes=10, args={"nonsense": 1}, timm="9.9")
    with pytest.raises(PruneError, match="cannot build resnet18"):
        build(wrong)


# ---------------------------------------------------------------------------------------------- input spec


def test_input_spec_is_the_checkpoints_own() -> None:
    ref = load_model("convnext_tiny.in12k_ft_in1k_384", pretrained=False).ref
    spec = input_spec(ref)
    assert (spec.size, spec.crop_pct, spec.crop_mode) == ((3, 384, 384), 1.0, "squash")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = input_spec(ModelRef(name="vit_tiny_patch16_224", num_classes=10, timm="1"))
    assert (spec.mean, spec.interpolation, spec.crop_pct) == ((0.5, 0.5, 0.5), "bicubic", 0.9)


def test_input_spec_follows_the_model_args() -> None:
    ref = load_model("vit_tiny_patch16_224", pretrained=False, model_args={"in_chans": 1, "img_size": 160}).ref
    spec = input_spec(ref)
    assert (spec.size, spec.mean, spec.std) == ((1, 160, 160), (0.5,), (0.5,))
    assert build(ref)(torch.zeros(1, 1, 160, 160)).shape == (1, 1000)
    ref = load_model("resnet18", pretrained=False, model_args={"in_chans": 1}).ref
    assert input_spec(ref).mean == (pytest.approx(0.449),)


def test_input_size_mean_and_std_of_the_user_go_before_the_checkpoints_own() -> None:
    asked = {"input_size": [1, 64, 32], "mean": [0.1], "std": [0.3]}
    ref = load_model("resnet18", pretrained=False, preprocessing=asked).ref
    spec = input_spec(ModelRef.model_validate_json(ref.model_dump_json()))
    assert (spec.size, spec.mean, spec.std, spec.interpolation) == ((1, 64, 32), (0.1,), (0.3,), "bicubic")
    assert ref.args == {}
    assert build(ref)(torch.zeros(1, 1, 64, 32)).shape == (1, 1000)
    assert input_spec(load_model("resnet18", pretrained=False).ref).size == (3, 224, 224)
    ref = load_model("vit_tiny_patch16_224", pretrained=False, preprocessing={"input_size": [3, 64, 64]}).ref
    assert build(ref)(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
