"""Models of the user's own from end to end: they work as timm's do, and nothing runs that the user did not name."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import prunecli
from prunecli.errors import PruneError, UsageError
from prunecli.graph.build import build_graph
from prunecli.measure import cost
from prunecli.measure.jacobian import jacobian_spectrum
from prunecli.models.build import input_spec
from prunecli.models.load import load_model
from prunecli.models.outputs import tensors_of
from prunecli.models.source import Source
from prunecli.models.tensors import named_tensors
from prunecli.recipe.recipe import Recipe
from prunecli.run import plan_and_prove
from prunecli.run.export import export
from prunecli.run.folder import RunFolder
from prunecli.run.source import load_source
from prunecli.surgery import cut as cutting
from toys import user_nets
from toys.cuts import allowed, error_of
from toys.jobs import JOB, call, sentence

SMALL = JOB[2:]  # without the model and --no-pretrained
NAMED = "--model=toys.user_nets:Residual"


def job(out: Path, model: str, *options: str, full: bool = False) -> dict[str, Any]:
    result = call("compress", model, *options, f"--out={out}", "--json", full=full)
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def halved(name: str) -> tuple[Source, nn.Module]:
    """A model of the user's own, and a copy with half of every group cut."""
    recipe = Recipe.from_mapping({"model": name, "target": "ratio=0.5", "prune": {"round_to": 1}})
    source = load_source(recipe)
    planned, _ = plan_and_prove.plan_and_prove(source, recipe, None)
    return source, cutting.cut(source.model, planned.plan)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job on a net of the user's own."""
    out = tmp_path_factory.mktemp("runs") / "residual"
    report = job(out, "toys.user_nets:Residual", *SMALL, full=True)
    assert report["model"] == "toys.user_nets:Residual"
    assert report["verify"] == {"reload_max_abs_diff": 0.0, "classes_equal": True, "ok": True}
    assert report["final"]["params"] < 0.6 * report["base"]["params"]
    assert "the weights are those that toys.user_nets:Residual returns" in report["warnings"]
    return out


# ---------------------------------------------------------------------------------------------- as timm's models


def test_a_function_gives_what_the_same_model_gives_by_its_timm_name() -> None:
    """The papers' networks are functions decorated with ``register_model``, as a user's registered model is."""
    recipe = Recipe.from_mapping({"target": "macs=50%", "pretrained": False, "prune": {"round_to": 1}})
    sources, plans, cuts = [], [], []
    for name in ("lenet5_relu", "prunecli.models.paper_nets:lenet5_relu"):
        source = load_source(recipe.model_copy(update={"model": name}))
        planned, _ = plan_and_prove.plan_and_prove(source, recipe, None)
        assert planned.plan.model.name == name
        sources.append((source.digest, source.spec, source.cost, source.ref.num_classes))
        plans.append(planned.plan.model_dump(mode="json", exclude={"model"}))
        cuts.append(cutting.cut(source.model, planned.plan).state_dict())
    assert sources[0] == sources[1]
    assert plans[0] == plans[1]
    assert equal(*cuts)


@pytest.mark.slow
def test_logits_inside_a_mapping_train_and_measure_as_bare_ones(tmp_path: Path) -> None:
    """Gradients for the criterion, probes, distillation, evaluation and spectra all read the same logits."""
    options = [*SMALL, "prune.criterion=taylor", "prune.calibration_images=32", "finetune.distill.alpha=0.5"]
    bare = job(tmp_path / "bare", "toys.user_nets:Residual", *options)
    inside = job(tmp_path / "inside", "toys.user_nets:InDict", *options)
    assert equal(weights(tmp_path / "bare"), weights(tmp_path / "inside"))
    for a, b in zip(bare["stages"], inside["stages"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert type(prunecli.load(tmp_path / "inside", model=user_nets.InDict)) is user_nets.InDict


def test_the_spectrum_of_logits_in_a_mapping_is_that_of_bare_ones() -> None:
    torch.manual_seed(0)
    inside, bare = user_nets.InDict(), user_nets.Residual()
    bare.load_state_dict(inside.state_dict())
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(jacobian_spectrum(inside, images).values, jacobian_spectrum(bare, images).values)


@pytest.mark.slow
def test_every_command_takes_a_function(tmp_path: Path) -> None:
    model = ["toys.user_nets:Residual", "--model-arg=width=6"]
    for command in (
        ["inspect", *model],
        ["inspect", "--graph=torch_pruning", *model],
        ["spectrum", "--samples=1", *model],
        ["lr", *model],
        ["eval", "--data=digits", "--limit=32", *model],
        ["compress", "--dry-run", "--target=ratio=0.5", "prune.round_to=1", *model],
        ["inspect", NAMED, "--model-arg=width=6"],
        ["eval", NAMED, "--model-arg=width=6", "data.name=digits", "data.val_limit=32"],
    ):
        result = call(*command, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)
    small = ["--data=digits", "--epochs=1", "data.train_limit=64", "data.val_limit=32", "spectrum.samples=0"]
    result = call("finetune", *model, *small, f"--out={tmp_path / 'tuned'}", "--json")
    assert result.exit_code == 0, result.stderr
    widths = prunecli.load(tmp_path / "tuned", model=lambda: user_nets.Residual(width=6)).stem.weight.shape  # type: ignore[union-attr]
    assert widths[0] == 6


def test_an_assumed_input_size_is_said() -> None:
    result = call("inspect", "toys.user_nets:resnet18")
    assert result.exit_code == 0, result.stderr
    assert "3 x 224 x 224 (assumed)" in result.stdout
    assert "(assumed)" not in call("inspect", "toys.user_nets:resnet18", "data.input_size=[3,32,32]").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "toys.user_nets:Nothing"], "has no 'Nothing'"),
        (["inspect", "toys.user_nets:Residual", "--model-arg=wdth=3"], "unexpected keyword argument 'wdth'"),
        (["inspect", "toys.user_nets:hugging_face"], "Did you mean 'hugging_face_vit'?"),
        (["inspect", "toys.user_nets:Residual", "data.input_size=[3,8,8]"], "does not take an image of 3x8x8"),
        (["inspect", "toys.user_nets:Residual", "data.input_size=[8,8]"], "data.input_size"),
        (["compress", "toys.user_nets:Residual", "toys.user_nets:InDict"], "One model at a time"),
        (["compress", "lenet5_relu", NAMED, "--no-pretrained"], "lenet5_relu is no run folder"),
        (["inspect"], "No model was given"),
        (["eval", "toys.user_nets:Residual"], "Evaluation needs data"),
    ],
)
def test_usage_errors(arguments: list[str], said: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert said in sentence(result)
    assert "Unexpected" not in result.stderr


# ---------------------------------------------------------------------------------------------- reloading


def test_a_run_is_loaded_with_the_function_and_verifies(run: Path) -> None:
    model = prunecli.load(run, model=user_nets.Residual)
    assert type(model) is user_nets.Residual
    assert equal({name: model.state_dict()[name] for name in weights(run)}, weights(run))
    result = call("verify", str(run), NAMED, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["reload_max_abs_diff"] == 0.0


@pytest.mark.slow
def test_a_run_is_measured_and_pruned_again_with_its_function_named(run: Path, tmp_path: Path) -> None:
    for command in (["inspect"], ["lr"], ["spectrum", "--samples=1"], ["eval", "--data=digits", "--limit=32"]):
        result = call(*command, str(run), NAMED)
        assert result.exit_code == 0, result.stderr
    report = job(tmp_path / "again", str(run), NAMED, "--target=ratio=0.5", "prune.round_to=1", "spectrum.samples=0")
    assert report["base"]["params"] == json.loads((run / "report.json").read_text())["final"]["params"]
    assert report["final"]["params"] < report["base"]["params"]
    recipe = Recipe.from_file(tmp_path / "again" / "recipe.yaml")
    assert (recipe.model, recipe.function) == (str(run), "toys.user_nets:Residual")
    assert equal(load_source(recipe).model.state_dict(), prunecli.load(run, model=user_nets.Residual).state_dict())


@pytest.mark.parametrize("name", ["Tied", "TwoOutputs", "in_function"])
def test_shared_weights_tables_of_chance_and_local_classes_reload_bit_equal(tmp_path: Path, name: str) -> None:
    source, smaller = halved(f"toys.user_nets:{name}")
    folder = RunFolder(path=tmp_path)
    export(folder, smaller, ref=source.ref, base=source.cost, final=source.cost)
    model = prunecli.load(tmp_path, model=getattr(user_nets, name))
    assert equal(named_tensors(model), named_tensors(smaller))
    assert {n: t.shape for n, t in model.state_dict().items()} != {
        n: t.shape for n, t in source.model.state_dict().items()
    }
    image = torch.randn(2, 1, 8, 8)
    assert all(map(torch.equal, tensors_of(model(image)), tensors_of(smaller(image))))
    if name == "Tied":
        assert model.second.weight is model.third.weight


# ---------------------------------------------------------------------------------------------- whom to obey


def recorded(run: Path, folder: Path, **model: Any) -> Path:
    """A copy of a run whose config names another model, as a stranger's may."""
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    config["prunecli"]["model"].update(model)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def malicious(run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run whose config names a command to run, and the file that the command would make."""
    trace = tmp_path / "executed"
    return recorded(run, tmp_path / "run", name="os:system", args={"command": f"touch {trace}"}), trace


@pytest.mark.parametrize(
    "command",
    [
        ["verify"],
        ["inspect"],
        ["lr"],
        ["spectrum"],
        ["eval", "--data=digits"],
        ["compress", "--target=ratio=0.5", "--out=again"],
        ["finetune", "--data=digits", "--out=again"],
    ],
)
@pytest.mark.parametrize("named", [[], [NAMED], ["--model=os:system"]])
def test_what_a_folder_names_is_not_run(
    malicious: tuple[Path, Path], command: list[str], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, trace = malicious
    result = call(command[0], str(folder), *command[1:], *named, full=True)
    assert result.exit_code == 2, result.stderr
    assert "os:system(command=" in sentence(result)
    assert not trace.exists()
    assert not (tmp_path / "again").exists()


def test_python_does_not_run_what_a_folder_names(malicious: tuple[Path, Path]) -> None:
    folder, trace = malicious
    with pytest.raises(UsageError, match="not run unless you name it"):
        prunecli.load(folder)
    called = []

    def mine() -> nn.Module:
        called.append(True)
        return user_nets.Residual()

    prunecli.load(folder, model=mine)  # the caller's own function, whatever the folder says
    assert called
    with pytest.raises(PruneError, match="does not fit the module that was made for it"):
        prunecli.load(folder, model=user_nets.resnet18)
    assert not trace.exists()


def test_arguments_are_named_by_the_user_too(run: Path, tmp_path: Path) -> None:
    folder = recorded(run, tmp_path / "run", args={"width": 12})
    result = call("verify", str(folder), NAMED, full=True)
    assert result.exit_code == 2
    assert "made by 'toys.user_nets:Residual(width=12)', not by 'toys.user_nets:Residual()'" in sentence(result)
    assert call("inspect", str(folder), NAMED, "--model-arg=width=12").exit_code == 0


def test_a_model_of_timm_needs_no_function(tmp_path: Path) -> None:
    loaded = load_model("lenet5_relu", pretrained=False)
    size = cost.measure(loaded.model, input_spec(loaded.ref).size)
    export(RunFolder(path=tmp_path), loaded.model, ref=loaded.ref, base=size, final=size)
    for arguments, said in ([NAMED], "Leave --model out"), (["--model-arg=width=3"], "Name it with --model"):
        result = call("verify", str(tmp_path), *arguments, full=True)
        assert result.exit_code == 2
        assert said in sentence(result)
    with pytest.raises(UsageError, match="holds a model of timm"):
        prunecli.load(tmp_path, model=user_nets.Residual)


# ---------------------------------------------------------------------------------------------- proofs


def assert_cuts_are_right(model: nn.Module, size: tuple[int, int, int], *, groups: int) -> None:
    """Each group alone, and random halves of all: what is left computes what the silenced dense net computes."""
    graph = build_graph(model, size)
    names = [group.name for group in graph.groups]
    assert len(names) == groups
    rng = random.Random(0)
    chosen = [[name] for name in names] + [[name for name in names if rng.random() < 0.5] or names for _ in range(4)]
    for some in chosen:
        kept = allowed(graph, some, rng)
        cut, outcome = error_of(model, graph, kept, size, rng)
        assert cut
        assert outcome.relative_error < 1e-9, (some, outcome.reason)


@pytest.mark.parametrize(
    ("function", "groups"),
    [(user_nets.Residual, 3), (user_nets.InDict, 3), (user_nets.TwoOutputs, 2), (user_nets.Tied, 1)],
)
def test_cuts_of_hand_made_nets(function: Callable[[], nn.Module], groups: int) -> None:
    torch.manual_seed(0)
    assert_cuts_are_right(function().eval(), (1, 8, 8), groups=groups)


def test_an_output_beside_the_logits_keeps_its_shape() -> None:
    source, smaller = halved("toys.user_nets:TwoOutputs")
    image = torch.randn(2, 1, 8, 8)
    assert [t.shape for t in smaller(image)] == [t.shape for t in source.model(image)] == [(2, 10), (2, 12)]
    assert smaller.blocks[0].conv1.weight.shape[0] == 6


def test_cuts_of_torchvisions_resnet() -> None:
    torch.manual_seed(0)
    graph = build_graph(user_nets.resnet18().eval(), (3, 32, 32))
    assert len(graph.groups) == 12
    kept = {group.name: group.width // 2 for group in graph.groups}
    _, outcome = error_of(user_nets.resnet18().eval(), graph, kept, (3, 32, 32), random.Random(0))
    assert outcome.relative_error < 1e-9


@pytest.mark.slow
def test_torchvisions_resnet_from_end_to_end(tmp_path: Path) -> None:
    model = ["torchvision.models:resnet18", "--model-arg=num_classes=10"]
    options = ["--target=macs=50%", "data.input_size=[3,32,32]", "finetune.epochs=1", *SMALL[3:]]
    report = job(tmp_path / "run", *model, "--data=digits", *options, full=True)
    assert report["verify"] == {"reload_max_abs_diff": 0.0, "classes_equal": True, "ok": True}
    assert report["final"]["macs"] == pytest.approx(report["base"]["macs"] / 2, rel=0.01)
    named = ["--model=torchvision.models:resnet18", "--model-arg=num_classes=10"]
    result = call("verify", str(tmp_path / "run"), *named, full=True)
    assert result.exit_code == 0, result.stderr
    loaded = prunecli.load(tmp_path / "run", model=user_nets.resnet18)
    assert equal({name: loaded.state_dict()[name] for name in weights(tmp_path / "run")}, weights(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what another library warns of is its own affair
def test_a_hugging_face_vit_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    assert_cuts_are_right(user_nets.hugging_face_vit().eval(), (3, 32, 32), groups=9)
    report = job(tmp_path / "run", "toys.user_nets:hugging_face_vit", "data.input_size=[3,32,32]", *SMALL, full=True)
    assert report["verify"] == {"reload_max_abs_diff": 0.0, "classes_equal": True, "ok": True}
    assert report["final"]["params"] < 0.5 * report["base"]["params"]
    loaded = prunecli.load(tmp_path / "run", model=user_nets.hugging_face_vit)
    assert loaded(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 10)
    assert equal(loaded.state_dict(), weights(tmp_path / "run"))  # type: ignore[arg-type]
