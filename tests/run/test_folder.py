"""The run folder: what is refused, what survives, what a loader says to damaged files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prunecli.errors import PruneError, UsageError, VerificationError
from prunecli.files import write_json
from prunecli.measure import cost
from prunecli.models.build import input_spec
from prunecli.models.load import load_model
from prunecli.recipe.recipe import Recipe
from prunecli.run import folder as run_folder
from prunecli.run import verify
from prunecli.run.export import export, load, reference_input
from prunecli.run.folder import RunFolder, locate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model, exported."""
    folder = RunFolder(path=tmp_path_factory.mktemp("exported"))
    loaded = load_model("lenet5_relu", pretrained=False)
    size = cost.measure(loaded.model, input_spec(loaded.ref).size)
    export(folder, loaded.model, ref=loaded.ref, base=size, final=size)
    return folder.path


@pytest.fixture
def damaged(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "run"))


def begun(path: Path) -> RunFolder:
    folder = RunFolder(path=path)
    run_folder.prepare_(folder, Recipe(model="resnet18"), resume=False, force=False)
    return folder


# ---------------------------------------------------------------------------------------------- folders


def test_default_folders_are_numbered_by_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(None, model="hf-hub:a/b c", resume=False, force=False).path == Path("runs/b-c-1")
    begun(Path("runs/b-c-9"))
    assert locate(None, model="hf-hub:a/b c", resume=False, force=False).path == Path("runs/b-c-10")
    assert locate(None, model="b c", resume=True, force=False).path == Path("runs/b-c-9")
    (tmp_path / "runs" / "b-c-9" / "report.json").touch()
    with pytest.raises(UsageError, match="no unfinished run of b-c"):
        locate(None, model="b c", resume=True, force=False)


def test_an_early_kill_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / ".recipe.yaml.123.tmp").touch()
    folder = locate(tmp_path / "run", model="resnet18", resume=False, force=False)
    run_folder.prepare_(folder, Recipe(model="resnet18"), resume=False, force=False)
    assert {path.name for path in folder.path.iterdir()} == {"recipe.yaml", "checkpoints"}


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/mine.pt", ".recipe.yaml.swp", ".mine.json.tmp"])
@pytest.mark.parametrize("force", [False, True])
def test_what_no_run_wrote_is_left_alone(tmp_path: Path, name: str, force: bool) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        locate(tmp_path / "out", model="resnet18", resume=False, force=force)
    assert file.read_text() == "mine"


def test_replacing_a_run_leaves_other_files(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    others = ("thesis.tex", "checkpoints/finetune/state-00001-00000000.safetensors")
    for file in (*folder.files, *(folder.path / name for name in others)):
        file.parent.mkdir(exist_ok=True)
        file.write_text("old")
    run_folder.prepare_(folder, Recipe(model="resnet18"), resume=False, force=True)
    assert {path.name for path in folder.path.iterdir()} == {"recipe.yaml", "checkpoints", "thesis.tex"}
    assert not list(folder.checkpoints.iterdir())


def test_a_run_begun_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    folder = locate(tmp_path / "run", model="resnet18", resume=False, force=False)
    begun(tmp_path / "run")
    with pytest.raises(UsageError, match="holds an unfinished run"):
        run_folder.prepare_(folder, Recipe(model="vgg11"), resume=False, force=False)
    assert folder.recipe().model == "resnet18"


def test_one_process_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_LOCK_SECONDS", 0)
    folder = RunFolder(path=tmp_path / "run")
    with run_folder.held(folder), pytest.raises(UsageError, match="Another process"), run_folder.held(folder):
        pass
    with run_folder.held(folder):
        pass


KILLED = """
import os, sys
from pathlib import Path
from prunecli.run.folder import RunFolder, held
with held(RunFolder(path=Path(sys.argv[1]))):
    if os.fork() == 0:
        sys.stdin.read()  # a loader process, which has yet to notice
        os._exit(0)
    os.kill(os.getpid(), 9)
"""


def test_a_killed_run_holds_its_folder_while_its_loader_processes_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(path=tmp_path)
    with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdin=subprocess.PIPE) as killed:
        assert killed.wait() == -signal.SIGKILL
        with monkeypatch.context() as impatient:
            impatient.setattr(run_folder, "_LOCK_SECONDS", 0)
            with pytest.raises(UsageError, match="Another process"), run_folder.held(folder):
                pass
        assert killed.stdin
        killed.stdin.close()
        with run_folder.held(folder):
            assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_file_in_the_way_is_found_before_any_work(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PruneError, match="a file stands where a folder is needed"):
        locate(tmp_path / out, model="resnet18", resume=False, force=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_found_before_any_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PruneError, match="permission is denied"):
        locate(tmp_path / "run", model="resnet18", resume=False, force=False)


def test_resume_and_force_exclude_each_other(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    with pytest.raises(UsageError, match="contradict"):
        locate(tmp_path / "run", model="resnet18", resume=True, force=True)


# ---------------------------------------------------------------------------------------------- loading


def test_a_model_comes_back_to_the_bit(exported: Path) -> None:
    state = load_model("lenet5_relu", pretrained=False).model.state_dict()
    found = load(exported).state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("prunecli"),
        lambda c: c.update(prunecli=3),
        lambda c: c["prunecli"].pop("structure"),
        lambda c: c["prunecli"].update(more=1),
        lambda c: c["prunecli"].update(weights_bytes="many"),
        lambda c: c["prunecli"]["model"].update(name="no_such_net"),
        lambda c: c["prunecli"]["model"].update(name="resnet18"),
        lambda c: c["prunecli"]["model"].update(num_classes=-1),
        lambda c: c["prunecli"]["model"].update(num_classes=11),
        lambda c: c["prunecli"]["model"].update(args={"depth": 4}),
        lambda c: c["prunecli"]["model"].update(args={"checkpoint_path": "evil.pth"}),
        lambda c: c["prunecli"]["structure"]["tensors"].update({"conv1.weight": [3, 1, 5, 5]}),
        lambda c: c["prunecli"]["structure"]["tensors"].update({"conv1.weight": [3]}),
        lambda c: c["prunecli"]["structure"]["tensors"].update({"conv1.weight": [-3, 1, 5, 5]}),
        lambda c: c["prunecli"]["structure"]["tensors"].update({"conv9.weight": [3]}),
        lambda c: c["prunecli"]["structure"]["attributes"].update({"conv9": {"out_channels": 3}}),
        lambda c: c["prunecli"]["structure"].update(extra=["conv9.weight"]),
    ],
)
def test_an_edited_config_is_one_plain_error(damaged: Path, change: Change) -> None:
    config = json.loads((damaged / "config.json").read_text())
    change(config)
    write_json(damaged / "config.json", config)
    with pytest.raises(PruneError) as caught:
        load(damaged)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe\x00"])
def test_a_broken_file_is_named(damaged: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (damaged / name).unlink()
    else:
        (damaged / name).write_bytes(content)
    with pytest.raises(PruneError, match=name) as caught:
        load(damaged)
    assert caught.value.exit_code == 1


Tensors = dict[str, Tensor]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("conv1.bias"),
        lambda t: t.update({"conv1.bias": t["conv1.bias"][:3].clone()}),
        lambda t: t.update({"conv1.bias": t["conv1.bias"].half()}),
        lambda t: t.update({"conv9.bias": torch.zeros(3)}),
    ],
)
def test_weights_that_do_not_fit_are_refused(damaged: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(damaged / "model.safetensors")
    change(tensors)
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(PruneError, match=r"does not fit lenet5_relu .*conv\d\.bias"):
        load(damaged)


def test_an_unfinished_run_is_no_model(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    with pytest.raises(UsageError, match="unfinished run, so there is no model yet"):
        load(tmp_path / "run")


# ---------------------------------------------------------------------------------------------- verification


def test_verification_runs_this_package_whatever_lies_around(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("random", "timm", "prunecli"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('hijacked')\n")
    monkeypatch.chdir(tmp_path)
    assert verify.verify(exported).ok


def test_another_reference_does_not_verify(damaged: Path) -> None:
    logits = load_file(damaged / "reference.safetensors")["logits"]
    save_file({"logits": logits + 1}, damaged / "reference.safetensors")
    assert not verify.verify_here(damaged).ok
    save_file({"logits": logits[:, :9].clone()}, damaged / "reference.safetensors")
    found = verify.verify_here(damaged)
    assert not found.ok
    assert not found.classes_equal


@pytest.mark.slow
def test_a_fresh_process_says_how_another_reference_differs(damaged: Path) -> None:
    logits = load_file(damaged / "reference.safetensors")["logits"]
    save_file({"logits": logits[:, :9].clone()}, damaged / "reference.safetensors")
    with pytest.raises(VerificationError, match="class count changed"):
        verify.verify(damaged)


def test_the_reference_images_are_the_same_everywhere() -> None:
    images = reference_input((1, 2, 2))
    expected = [((at * 2654435761 + 40503) % 2**24) / 2**23 - 1 for at in range(8)]
    assert images.flatten().tolist() == expected


def test_exporting_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    loaded = load_model("lenet5_relu", pretrained=False)
    model: nn.Module = loaded.model.train()
    size = cost.measure(model, input_spec(loaded.ref).size)
    export(RunFolder(path=tmp_path), model, ref=loaded.ref, base=size, final=size)
    assert model.training
