"""Text for people, against golden files (``PYTHONPATH=tests python tests/show/test_tables.py`` rewrites them)."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from prunecli.show import tables, wording
from prunecli.values.groups import Bundle, Const, Frozen, Graph, Group, Member, Tie
from prunecli.values.inspection import Inspection
from prunecli.values.report import Accuracy, PhaseReport, Report, TargetResult, VerifyReport
from toys import sample_matrix, sample_rates
from toys import sample_report as sample

GOLDEN = Path(__file__).parent / "golden"


def text(view: RenderableType, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(view)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def graph() -> Graph:
    def member(layer: str, dim: int) -> Member:
        return Member(tensor=f"{layer}.weight", dim=dim, role="out" if dim == 0 else "in")

    groups = (
        Group(name="stem", kind="channels", width=64, members=(member("stem", 0), member("blocks.0.fc1", 1))),
        Group(
            name="blocks.0.attn.heads",
            kind="heads",
            width=3,
            members=tuple(member(f"blocks.{place}.attn.qkv", 0) for place in range(5)),
        ),
    )
    frozen = (
        Frozen(name="head", width=1000, tensors=("head.weight",), reason="it is the axis of the classes"),
        Frozen(name="pos_embed", width=197, tensors=("pos_embed",), reason="it counts positions, not channels"),
        Frozen(name="rel_pos", width=49, tensors=("rel_pos",), reason="it counts positions, not channels"),
    )
    return Graph(
        engine="axes",
        groups=groups,
        frozen=frozen,
        ties=(
            Tie(
                choices=(
                    (Bundle(groups=("stem",), parts=64),),
                    (Bundle(groups=("blocks.0.attn.heads",), parts=4), Bundle(groups=("q", "k"), parts=16)),
                )
            ),
        ),
        exclusive=(("blocks.0.attn:heads", "blocks.0.attn:head_dim"),),
        tensors={"stem.weight": (Const(64),)},
        ops=(),
        folds=(),
        solve=lambda kept: (),
        unknown_ops={"aten.frobnicate": 2},
    )


def summary(report: Report, folder: Path) -> RenderableType:
    return tables.report_summary(report, page=folder / "report.html", model=folder / "model.safetensors")


def views() -> dict[str, RenderableType]:
    report = sample.report()
    inspected = Inspection(
        graph=graph(),
        prunable_share=0.834,
        supported=True,
        status="half of every group was cut on trial: the net equals the silenced dense net to 1.2e-15",
        cost=sample.DENSE,
        model=sample.plan().model,
        input_size=(3, 32, 32),
    )
    proof = "pruned net equals silenced dense net to 3.1e-15 (relative, float64)"
    layers = {layer.name: layer.sv_before for layer in report.layers[:3]} | {"dead": (2.0, 0.0)}
    assert report.target
    assert report.lr
    assert report.verify
    return {
        "report": summary(report, Path("runs/cifar_resnet20-1")),
        "plan": tables.plan_table(sample.plan(), report.target, proof, ("[b]rounded[/b] up to 8",)),
        "inspect": tables.inspection(inspected),
        "spectrum": tables.spectrum_table("cifar_resnet20", sample.summary(16.2, 0, 58, None), layers, "noise"),
        "lr": tables.lr_table(report.lr),
        "rates": tables.rates_table(sample_rates.measured(), page=Path("runs/cifar_resnet20-2/lr.html")),
        "verify": tables.verify_line(Path("runs/a"), report.verify),
        "eval": tables.accuracy_table(
            "cifar_resnet20", "digits", Accuracy(top1=91.504, top5=None, loss=0.3124, samples=360), ("EMA weights",)
        ),
        "recipes": tables.recipe_list([("quickstart", "digits in two minutes"), ("papers/tpp_resnet56", "")]),
        "models": tables.matrix_table(sample_matrix.matrix()),
        "architectures": tables.architectures_table(sample_matrix.matrix().matching("*")),
    }


VIEWS = ["report", "plan", "inspect", "spectrum", "lr", "rates", "verify", "eval", "recipes", "models", "architectures"]


@pytest.mark.parametrize("name", VIEWS)
def test_golden_text(name):
    assert text(views()[name]) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", VIEWS)
def test_eighty_columns_hold_every_number(name):
    """No line overflows, and nothing but long names and sentences is folded: all figures survive in one piece."""
    narrow, wide = text(views()[name], 80), text(views()[name], 160)
    assert max(cell_len(line) for line in narrow.splitlines()) <= 80
    numbers = {word for word in wide.split() if word.replace(".", "").replace("-", "").isdigit()}
    assert numbers <= set(narrow.split())
    assert "…" not in narrow


def test_a_run_without_data_or_target_or_spectrum():
    bare = sample.stages()[1].model_copy(update={"top1": None, "top5": None, "loss": None, "jsv": None})
    dense = sample.stages()[0].model_copy(update={"top1": None, "top5": None, "loss": None, "jsv": None})
    report = sample.report(stages=(dense, bare), target=None, lr=None, finetune=None, verify=None, recovery=())
    shown = text(summary(report, Path("runs/a")), 200)
    assert "its accuracy was not measured" in shown
    assert "top-1" not in shown.split("stage")[0]
    assert "runs/a/report.html" in shown
    assert "target" not in shown


def test_two_starts_that_are_one_are_said_to_be():
    curves = {name: sample_rates.CURVES[name] for name in ("none", "orthp+bn")}
    shown = " ".join(text(tables.rates_table(sample_rates.measured(curves, chosen="none"), page=Path("a"))).split())
    assert "The recipe's recovery is plain pruning, which is an arm already and was not trained twice." in shown
    assert "none (chosen)" in shown
    assert "trained twice" not in text(tables.rates_table(sample_rates.measured(), page=Path("a")))


def test_a_failed_verification_says_so():
    failed = VerifyReport(reload_max_abs_diff=0.5, classes_equal=False, ok=False)
    shown = text(tables.verify_line(Path("runs/a"), failed), 200)
    assert "FAILED" in shown
    assert "5.0e-01" in shown
    assert "another number of classes" in shown


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (999, "999"), (1000, "1.000 k"), (853_018, "853.0 k"), (999_990, "1.000 M"), (4.0891e9, "4.089 G")],
)
def test_counts(value, expected):
    assert wording.count(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (0.0, "0"),
        (2034.4, "2034"),
        (16.24, "16.2"),
        (3.0, "3.00"),
        (0.00123, "0.00123"),
        (2.5e7, "2.5e+07"),
    ],
)
def test_figures(value, expected):
    assert wording.figure(value) == expected


def test_sizes_durations_and_changes():
    assert [wording.size(n) for n in (12, 3_412_000, 2.1e9)] == ["12 B", "3.41 MB", "2.10 GB"]
    assert [wording.duration(s) for s in (0.44, 119, 750, 11_520)] == ["0.4 s", "119.0 s", "12.5 min", "3.2 h"]
    assert wording.relative(200, 100) == "-50.0 %"
    assert wording.relative(0, 1) == "-"
    assert wording.factor(200, 100) == "2.00x fewer"
    assert wording.factor(100, 100) == "unchanged"
    assert wording.points(91.5, 89.92) == "-1.58"


def test_targets_speak_their_own_unit():
    def line(metric: str, asked: float) -> str:
        return wording.target_line(TargetResult(metric=metric, asked=asked, reached=asked, reachable=(asked, asked)))

    assert line("size", 2e7).startswith("size: asked 20.00 MB")
    assert line("speedup", 2.0).startswith("speedup: asked 2x")
    assert line("ratio", 0.3).startswith("ratio: asked 0.3,")
    assert line("params", 1e7).startswith("params: asked 10.00 M")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for view_name, view in views().items():
        (GOLDEN / f"{view_name}.txt").write_text(text(view), encoding="utf-8")


def test_a_phase_of_gates_says_how_many_are_open():
    gate = PhaseReport(
        name="gate", method="abp", steps=400, epochs=10, lr=0.1, open_before=0.592, open_after=0.8025, seconds=593.0
    )
    told = " ".join(text(summary(sample.report(phases=(gate,)), Path("runs/a")), width=200).split())
    assert "abp, every channel has a gate that learns whether it is needed: 400 steps = 10 epochs at LR 0.1; " in told
    assert "open gates 59.2 % → 80.2 %" in told  # 80.25 is a shade below in binary


def test_a_phase_that_was_taught_says_so():
    phase = PhaseReport(name="push", method="tpp", steps=400, epochs=10, lr=0.01, distill=0.9, seconds=1.0)
    told = " ".join(text(summary(sample.report(phases=(phase,)), Path("runs/a")), width=200).split())
    assert "at LR 0.01; 0.9 of the loss distilled from the dense model" in told


def test_phases_before_the_cut_are_told_with_the_budget():
    grow, push = sample.phases()
    told = text(summary(sample.report(phases=(grow, push), total_epochs=41.5), Path("runs/a")), width=200)
    lines = [" ".join(line.split()) for line in told.splitlines() if line.startswith(("before", "budget"))]
    assert lines == [
        "before the cut tpp, a small penalty grows on all channels, then they are picked: 3,900 steps = 10 epochs at "
        "LR 0.001; norm of all channels 30.0 → 20.0",
        "before the cut tpp, channels that leave are pushed towards zero: 12,000 steps = 31 epochs at LR 0.001; norm "
        "of pushed channels 16.2 → 0; Gram loss 0.394 → 0",
        "budget 42 epochs of training in all, the phase before the cut included",
    ]
