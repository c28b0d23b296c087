"""Functions that make a user's model: found, called, checked; every mistake is one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from prunecli.errors import UnsupportedError, UsageError
from prunecli.models.load import load_model
from prunecli.models.user_function import Function, count_classes, declared_input, make, names_function
from toys import user_nets

MINE = """
import sys
import torch
from torch import nn

print("what a module says while it is imported")
weight = nn.Linear(4, 2)
number = 3
class Holder:
    @staticmethod
    def net(width=2):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, width))
def raises():
    raise KeyError("no\\nluck")
def exits():
    sys.exit("bye")
def nothing():
    return None
"""


@pytest.mark.parametrize("name", ["nets:tiny", "a.b_1.c:Zoo.make", "torchvision.models:resnet18"])
def test_names_of_functions(name: str) -> None:
    assert names_function(name)


@pytest.mark.parametrize(
    "name", ["resnet18", "hf-hub:a/b", "hf_hub:gpt2", "local-dir:x", "a/b:c", "a:b/c", ":x", "x:", "a..b:c", "1a:b"]
)
def test_names_of_other_things(name: str) -> None:
    assert not names_function(name)


# ---------------------------------------------------------------------------------------------- finding and calling


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder holds the module ``mine``, which nothing else can see."""
    (tmp_path / "mine_in_a_folder.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_in_a_folder", raising=False)
    return tmp_path


def test_modules_of_the_current_folder_are_found_and_the_path_is_left_alone(mine: Path) -> None:
    before = list(sys.path)
    made = make(Function(name="mine_in_a_folder:Holder.net", args={"width": 5}), title="it")
    assert made(torch.zeros(1, 3, 4, 4)).shape == (1, 5)
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("no_such_module_here:net", {}, "'no_such_module_here' of 'no_such_module_here:net' cannot be imported"),
        ("mine_in_a_folder.sub:net", {}, "cannot be imported"),
        ("mine_in_a_folder:Holdr", {}, "has no 'Holdr'. Did you mean 'Holder'?"),
        ("mine_in_a_folder:Holder.nett", {}, "Did you mean 'net'?"),
        ("mine_in_a_folder:number", {}, "is of type int and no function"),
        ("mine_in_a_folder:weight", {}, "is of type Linear and no function"),
        ("mine_in_a_folder:raises", {}, "failed: KeyError: 'no\\nluck'."),
        ("mine_in_a_folder:exits", {}, "failed: SystemExit: bye."),
        ("mine_in_a_folder:nothing", {}, "returned NoneType, not an nn.Module"),
        ("mine_in_a_folder:Holder.net", {"wdth": 3}, "Holder.net(wdth=3) failed: TypeError"),
        ("mine_in_a_folder", {}, "does not name a function"),
        ("__main__:net", {}, "Put it into a file"),
    ],
)
def test_mistakes_are_usage_errors_of_one_sentence(mine: Path, name: str, args: dict[str, int], said: str) -> None:
    function = Function(name=name, args=args)
    with pytest.raises(UsageError) as error:
        make(function, title=f"Model {function}")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_module_that_fails_or_exits_while_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, text in enumerate(("import no_such_package", "raise SystemExit(3)", "def broken(:")):
        (tmp_path / f"mine_broken_{number}.py").write_text(text)
        with pytest.raises(UsageError, match=f"'mine_broken_{number}' of .* cannot be imported"):
            make(Function(name=f"mine_broken_{number}:net", args={}), title="it")


# ---------------------------------------------------------------------------------------------- what comes out


def test_random_weights_follow_the_seed_and_leave_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    a, b = (make(user_nets.Residual, title="it", seed=seed) for seed in (3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = user_nets.Residual()
    assert torch.equal(a.stem.weight, expected.stem.weight)  # type: ignore[union-attr]
    assert not torch.equal(a.stem.weight, b.stem.weight)  # type: ignore[union-attr]
    assert not a.training


def test_what_the_function_hands_out_stays_as_it_is() -> None:
    shared = user_nets.Residual().train()
    made = make(lambda: shared, title="it")
    assert made is not shared
    assert shared.training
    assert made.stem.weight.data_ptr() != shared.stem.weight.data_ptr()  # type: ignore[union-attr]


def test_other_floating_types_become_float32_and_are_noted() -> None:
    notes: list[str] = []
    made = make(lambda: user_nets.Residual().to(torch.bfloat16), title="it", notes=notes)
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert notes == ["weights of torch.bfloat16 are taken as torch.float32"]
    make(user_nets.Residual, title="it", notes=(none := []))  # type: ignore[var-annotated]
    assert not none


class Tables(user_nets.Tied):
    def __init__(self) -> None:
        super().__init__()
        self.tables = {"a": torch.ones(16)}


class Generating(user_nets.Tied):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = (n for n in range(3))


class Stateful(user_nets.Tied):
    def get_extra_state(self) -> object:
        return {"version": 1}


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("function", "kind", "said"),
    [
        (Tables, UnsupportedError, "plain dict 'tables'"),
        (Generating, UnsupportedError, "cannot be copied"),
        (Stateful, UnsupportedError, "'_extra_state' of its state_dict is a dict"),
        (on_meta, UsageError, "'weight' has no values yet"),
        (lambda: nn.LazyLinear(3), UsageError, "'weight' has no values yet"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), UsageError, "Return the module inside it"),
        (nn.ReLU, UsageError, "no parameters"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_modules_that_cannot_be_kept_in_a_file_are_refused(
    function: Callable[[], nn.Module], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        make(function, title="it")


# ---------------------------------------------------------------------------------------------- what it takes and gives


def test_what_a_module_declares_of_its_input() -> None:
    assert declared_input(user_nets.Residual()) == {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "crop_pct": 1}
    timms = declared_input(timm.create_model("resnet18"))
    assert timms["input_size"] == [3, 224, 224]
    assert timms.keys() == {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    assert declared_input(nn.Linear(2, 2)) == {}
    net = nn.Linear(2, 2)
    net.pretrained_cfg = object()  # type: ignore[assignment]
    assert declared_input(net) == {}


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        ({"input_size": (8, 8)}, "input_size that the model declares is wrong"),
        ({"input_size": (0, 8, 8)}, "input_size that the model declares is wrong"),
        ({"mean": "imagenet"}, "mean that the model declares is wrong"),
        ({"std": (0.0,)}, "std that the model declares is wrong"),
    ],
)
def test_a_wrong_declaration_is_named(cfg: dict[str, object], said: str) -> None:
    net = nn.Linear(2, 2)
    net.default_cfg = cfg  # type: ignore[assignment]
    with pytest.raises(UsageError, match=said):
        declared_input(net)


class NeedsMask(user_nets.Residual):
    def forward(self, images: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(images, mask)


class Headless(nn.Flatten):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[:, :0]


def test_classes_are_counted_by_one_forward_pass_that_leaves_no_trace() -> None:
    net = user_nets.InDict(classes=7).train()
    statistics = net.blocks[0].bn1.running_mean.clone()  # type: ignore[union-attr]
    assert count_classes(net, (1, 8, 8), title="it") == 7
    assert torch.equal(net.blocks[0].bn1.running_mean, statistics)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("net", "size", "kind", "said"),
    [
        (user_nets.Residual(), (3, 8, 8), UsageError, "it does not take an image of 3x8x8: RuntimeError"),
        (NeedsMask(), (1, 8, 8), UsageError, "missing 1 required positional argument: 'mask'.*images alone"),
        (nn.Conv2d(1, 2, 1), (1, 8, 8), UnsupportedError, r"returns shape \(1, 2, 8, 8\)"),
        (Headless(), (1, 8, 8), UnsupportedError, "has no classifier"),
    ],
)
def test_a_net_that_takes_or_gives_something_else(
    net: nn.Module, size: tuple[int, int, int], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        count_classes(net.eval(), size, title="it")


# ---------------------------------------------------------------------------------------------- loading


def test_what_was_assumed_is_said() -> None:
    loaded = load_model("toys.user_nets:resnet18")
    assert loaded.ref.assumes_input_size
    assert loaded.notes == (
        "the weights are those that toys.user_nets:resnet18 returns",
        "toys.user_nets:resnet18 does not say what it takes; assumed: images of 3x224x224, the mean and std of "
        "ImageNet",
    )
    loaded = load_model(
        "toys.user_nets:resnet18",
        preprocessing={"input_size": [3, 32, 32], "mean": [0.5], "std": [0.5]},
        pretrained=False,
    )
    assert not loaded.ref.assumes_input_size
    assert loaded.notes == (
        "the weights are those that toys.user_nets:resnet18 returns, which --no-pretrained does not change",
    )


def test_a_weights_file_is_loaded_strictly_and_a_shared_tensor_may_stand_there_once(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = user_nets.Tied().state_dict()
    del state["third.weight"]
    torch.save(state, tmp_path / "tied.pth")
    loaded = load_model("toys.user_nets:Tied", weights=tmp_path / "tied.pth")
    assert loaded.notes == ()
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in state.items())
    assert loaded.model.third.weight is loaded.model.second.weight  # type: ignore[union-attr]
    del state["second.weight"]
    torch.save(state, tmp_path / "tied.pth")
    with pytest.raises(Exception, match=r"does not fit toys\.user_nets:Tied: 2 missing"):
        load_model("toys.user_nets:Tied", weights=tmp_path / "tied.pth")
