"""The papers' tables are trained by loops of their own; here they are held to the tool's trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.accuracy import defaults, lr_regret, recoveries, resnet56
from benchmarks.shared.ledger import Ledger
from benchmarks.shared.papers import Split, pruned
from benchmarks.shared.resident import Course, Resident
from benchmarks.shared.side_by_side import Arm, SideBySide, stacked_logits
from benchmarks.shared.torch_pruning_cut import nearest_cut
from prunecli.data.images import Images, epoch_order
from prunecli.data.sources import ArraySplit
from prunecli.files import write_tensors
from prunecli.measure.cost import measure
from prunecli.models.build import input_spec
from prunecli.models.load import load_model
from prunecli.recipe.recipe import Recipe
from prunecli.recipe.settings import DataSettings, FinetuneSettings
from prunecli.training.finetune import finetune
from prunecli.training.loop import TrainingRun
from prunecli.training.recommended_lr import MEASURED_REGRETS

CPU = torch.device("cpu")
PAPERS = FinetuneSettings(
    optimizer="sgd", schedule={"kind": "step", "milestones": (0.5,)}, weight_decay=1e-2, decay_norms=True
)


class Noise:
    """Images of noise in batches of eight, the last one smaller, in the order that ``data.Images`` would take."""

    num_classes = 10
    steps_per_epoch = 3

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(20, 1, 32, 32, generator=generator)
        self.labels = torch.randint(0, 10, (20,), generator=generator)
        self.seed = seed

    def train_loader(self, *, epoch: int, skip_batches: int = 0, companion: str = "none") -> DataLoader[Any]:
        order = epoch_order(20, seed=self.seed, epoch=epoch)[8 * skip_batches :].tolist()
        return DataLoader(TensorDataset(self.images, self.labels), sampler=order, batch_size=8)

    def val_loader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.images, self.labels), batch_size=8)

    def calibration(self, count: int) -> tuple[Tensor, Tensor]:
        return self.images[:count], self.labels[:count]


def tool_run(net: str, start: dict[str, Tensor], *, seed: int, lr: float) -> tuple[dict[str, Tensor], float]:
    model = load_model(net, pretrained=False).model
    model.load_state_dict(start)
    report = finetune(model, Noise(seed), PAPERS, lr=lr, epochs=2, run=TrainingRun(device=CPU, seed=seed))
    assert report.last_top1 is not None
    return model.state_dict(), report.last_top1


@pytest.mark.parametrize("net", ["mlp7_relu", "lenet5_relu"])
def test_runs_side_by_side_are_the_tools_own_runs(net: str, tmp_path: Path) -> None:
    starts = [load_model(net, pretrained=False, seed=seed).model.state_dict() for seed in (5, 6)]
    arms = {0.2: starts, 0.05: starts[::-1]}
    seeds = (0, 3)
    data = Noise(0)
    split = Split(images=data.images, labels=data.labels)

    def fresh() -> SideBySide:
        return SideBySide(
            load_model(net, pretrained=False).model,
            [Arm(starts=found, lr=lr, settings=PAPERS) for lr, found in arms.items()],
            split,
            seeds=seeds,
            epochs=2,
            batch_size=8,
            device=CPU,
        )

    stack = fresh()
    stack.train_epoch()
    stack.save(tmp_path / "position.safetensors", {"runs": ["these"]})
    stack.train_epoch()
    run = 0
    for place, seed in enumerate(seeds):
        for lr, found in arms.items():
            expected, top1 = tool_run(net, found[place], seed=seed, lr=lr)
            torch.testing.assert_close(stack.state(run), dict(expected), atol=2e-6, rtol=1e-5)
            assert stack.top1(split, chunk=7)[run] == pytest.approx(top1)
            assert any((stack.state(run)[name] - found[place][name]).abs().max() > 1e-3 for name in expected)
            run += 1
    resumed = fresh()
    assert resumed.resume(tmp_path / "position.safetensors", runs=["others"]) is None
    assert resumed.resume(tmp_path / "position.safetensors", runs=["these"]) == {"runs": ["these"], "epoch": 1}
    resumed.train_epoch()
    assert all(bool((resumed.params[name] == tensor).all()) for name, tensor in stack.params.items())


@pytest.mark.parametrize("net", ["mlp7_linear", "lenet5_linear"])
def test_one_batch_for_all_runs(net: str) -> None:
    models = [load_model(net, pretrained=False, seed=seed).model for seed in range(3)]
    params = {
        name: torch.stack([dict(m.named_parameters())[name] for m in models])
        for name, _ in models[0].named_parameters()
    }
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([model(images) for model in models])
    torch.testing.assert_close(stacked_logits(models[0], params, images[None]), expected, atol=1e-6, rtol=1e-5)


def colours(count: int, *, seed: int) -> ArraySplit:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, size=(count, 32, 32, 3), dtype=np.uint8)
    return ArraySplit(pixels=pixels, labels=rng.integers(0, 10, size=count), mode="RGB")


def cifar(seed: int) -> tuple[Images, Split, Split]:
    """Twenty training images as the tool reads them, and the same as tensors."""
    spec = input_spec(load_model("cifar_resnet20", pretrained=False).ref)
    settings = DataSettings(name="colours", batch_size=8)
    train, test = colours(20, seed=0), colours(12, seed=1)
    names = [str(label) for label in range(10)]
    images = Images(train=train, val=test, class_names=names, settings=settings, spec=spec, seed=seed)
    plain = [(torch.from_numpy(part.pixels).permute(0, 3, 1, 2) / 255, part) for part in (train, test)]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    splits = [Split(images=(x - mean) / std, labels=torch.from_numpy(part.labels)) for x, part in plain]
    return images, splits[0], splits[1]


LR = 0.005  # at 0.05 BatchNorm over four images of noise turns the last bit of a sum into the third digit of a weight


def test_the_resident_loop_is_the_tools_own(tmp_path: Path) -> None:
    images, train, test = cifar(seed=4)
    start = load_model("cifar_resnet20", pretrained=False, seed=1)
    spec = input_spec(start.ref)
    course = Course(settings=PAPERS, lr=LR, epochs=2, batch_size=8, seed=4)

    def fresh() -> Resident:
        model = load_model("cifar_resnet20", pretrained=False, seed=1).model
        return Resident(model, course, train, test, spec)

    ours = fresh()
    for _ in range(3):
        ours.step_()
    ours.save(tmp_path / "position.safetensors", {"name": "this"})
    for _ in range(3):
        ours.step_()
    assert ours.done
    report = finetune(start.model, images, PAPERS, lr=LR, epochs=2, run=TrainingRun(device=CPU, seed=4))
    assert ours.top1() == pytest.approx([entry["top1"] for entry in report.history])
    expected = start.model.state_dict()
    torch.testing.assert_close(dict(ours.model.state_dict()), dict(expected), atol=2e-6, rtol=1e-5)
    resumed = fresh()
    assert resumed.resume(tmp_path / "absent.safetensors") is None
    assert resumed.resume(tmp_path / "position.safetensors") == {"name": "this"}
    for _ in range(3):
        resumed.step_()
    assert all(
        bool((tensor == ours.model.state_dict()[name]).all()) for name, tensor in resumed.model.state_dict().items()
    )
    assert resumed.top1() == ours.top1()


@pytest.mark.parametrize(
    ("ratio", "widths"),
    [(0.3, (11, 22, 44)), (0.5, (8, 16, 32)), (0.7, (4, 9, 19)), (0.9, (1, 3, 6)), (0.95, (1, 1, 3))],
)
def test_the_cut_leaves_the_papers_widths(tmp_path: Path, ratio: float, widths: tuple[int, ...]) -> None:
    base = tmp_path / "base.safetensors"
    write_tensors(base, load_model("cifar_resnet20", pretrained=False, seed=0).model.state_dict())
    model = pruned("cifar_resnet20", base, ratio, select=("layer*.*.conv1",))
    assert tuple(len(getattr(model, f"layer{stage}")[1].conv1.weight) for stage in (1, 2, 3)) == widths


def test_a_table_fills_over_several_occasions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resnet56, "NET", "cifar_resnet20")
    base = tmp_path / "base.safetensors"
    write_tensors(base, load_model("cifar_resnet20", pretrained=False, seed=0).model.state_dict())
    _, train, test = cifar(seed=0)
    few = Split(images=train.images[:4], labels=train.labels[:4])
    bench = resnet56.Bench(train=few, test=test, weights=base, work=tmp_path / "work", epochs=2, tpp=tmp_path)
    ledger = Ledger(tmp_path / "results.json")
    every = [run for run in resnet56.all_runs() if run.ratio == 0.95 and run.seed == 0]
    runs = [run for run in every if bench.can_start(run)][:2]
    assert [run.arm.name for run in every if not bench.can_start(run)] == ["TPP, 0.01", "TPP, 0.001"]
    resnet56.fill(bench, ledger, runs, together=2, seconds=0.0)  # the time is up after one epoch
    assert ledger.records == {}
    assert len(list((tmp_path / "work").glob("*.safetensors"))) == 2
    resnet56.fill(bench, ledger, runs, together=2, seconds=60.0)
    assert set(ledger.records) == {run.key for run in runs}
    assert not list((tmp_path / "work").glob("*.safetensors"))
    first = ledger.records[runs[0].key]
    assert first["best"] == max(first["top1"].values())
    assert f"{first['best']:.2f}(0.00), n=1" in resnet56.table(ledger.records)
    assert "time is up: 2 runs saved" in capsys.readouterr().out


def test_the_table_of_recoveries_is_made_of_the_rows_that_were_measured_with_its_budget(tmp_path):
    """Two seeds are averaged, another budget is another row, and what is missing is said."""
    where = ["--weights=w", "--data-dir=d", f"--out={tmp_path / 'rows.json'}"]
    common = [*where, "--ratios", "0.7", "--lrs", "0.01", "0.03", "--seeds", "0", "1", "--arms", "bn", "lstsq+bn"]
    options = recoveries.parsed([*common, "--epochs=1"])
    ledger = Ledger(options.out)
    for seed, top1 in ((0, 50.0), (1, 60.0)):
        found = {"before": 20.0, "top1": top1, "best": top1 + 1}
        ledger.add({recoveries.key(options, (0.7, 0.01, seed, "bn")): found}, device=CPU)
    longer = recoveries.parsed([*common, "--epochs=2"])
    found = {"before": 20.0, "top1": 99.0, "best": 99.0}
    ledger.add({recoveries.key(longer, (0.7, 0.03, 0, "bn")): found}, device=CPU)
    assert recoveries.table(options).splitlines() == [
        "| PR | recovery | seeds | before | LR 0.01: last | best | LR 0.03: last | best |",
        "|---|---|---|---|---|---|---|---|",
        "| 0.7 | bn | 2/0 | 20.00(0.00) | 55.00(7.07) | 56.00(7.07) | not run | not run |",
    ]


@pytest.mark.parametrize(
    ("arm", "method", "taught"),
    [("lstsq+bn+kd", "oneshot", 0.0), ("tpp+kd", "tpp", 0.0), ("kd+tpp+kd", "tpp", 0.9), ("kd+greg+kd", "greg", 0.9)],
)
def test_an_arm_says_what_happens_before_the_cut(arm: str, method: str, taught: float) -> None:
    options = recoveries.parsed(["--weights=w.safetensors", "--data-dir=d"])
    recipe = recoveries.recipe_for(options, 0.7, 3, arm)
    assert (recipe.method.kind, recipe.finetune.distill.share) == (method, taught)
    assert (recipe.seed, recipe.prune.select, recipe.target.value) == (3, ("layer*.*.conv1",), 0.7)


def test_a_changed_recipe_or_teacher_is_a_row_of_its_own() -> None:
    common = ["--weights=w.safetensors", "--data-dir=d", "--teacher", "0.5", "2", "--set", "method.reg_every=3"]
    changed = recoveries.parsed(common)
    recipe = recoveries.recipe_for(changed, 0.7, 0, "kd+tpp+kd")
    distill = recipe.finetune.distill
    assert (recipe.method.reg_every, distill.share, distill.temperature) == (3, 0.5, 2.0)
    row = (0.7, 0.01, 0, "kd+tpp+kd")
    assert recoveries.key(changed, row).endswith("judged on 2000 | method.reg_every=3 | teacher 0.5 2.0")
    assert recoveries.key(recoveries.parsed(common[:2]), row).endswith("judged on 2000")


@pytest.mark.parametrize("assignment", ["seed=7", "finetune.distill.alpha=0.3", "finetune={lr: 0.1}", "data.dir=x"])
def test_a_recipes_key_that_the_comparison_sets_itself_is_refused(
    assignment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        recoveries.parsed(["--set", assignment])
    assert f"--set cannot change {assignment}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arm", "lr", "steps", "alpha"),
    [
        ("defaults", "auto", ("auto",), "auto"),
        ("fixed rate", 0.02, ("auto",), "auto"),
        ("no recovery", "auto", (), "auto"),
        ("no teacher", "auto", ("auto",), 0.0),
        ("plain", 0.02, (), 0.0),
    ],
)
def test_an_arm_switches_off_what_it_says_and_nothing_else(arm: str, lr: Any, steps: Any, alpha: Any) -> None:
    base = Recipe.from_mapping({"model": "test_vit", "data": {"name": "torch/cifar10", "train_limit": 5000}})
    recipe = defaults.recipe_of(base, arm, seed=2, rate=0.02)
    assert (recipe.finetune.lr, recipe.recover.steps, recipe.finetune.distill.alpha) == (lr, steps, alpha)
    assert (recipe.seed, recipe.finetune.epochs, str(recipe.target)) == (2, defaults.EPOCHS, "macs=50%")
    assert recipe.prune == Recipe.from_mapping({}).prune
    assert recipe.data == base.data


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.slow
def test_the_peer_s_cut_of_a_transformer_runs_near_half_of_its_multiply_adds() -> None:
    dense = load_model("test_vit", pretrained=False, model_args={"img_size": 32, "num_classes": 10}).model
    net, _ = nearest_cut(dense, (3, 32, 32), 0.5)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert measure(net, (3, 32, 32)).macs / measure(dense, (3, 32, 32)).macs == pytest.approx(0.5, abs=0.03)


def test_an_arm_is_in_the_table_of_defaults_once_all_of_its_seeds_are() -> None:
    record = {"params": 0.5, "macs": 0.5, "pruned": 12.0, "lr": 1e-3, "best": 60.0}
    records = {defaults.key("test_vit", "plain", seed): {**record, "top1": 50.0 + 3 * seed} for seed in (0, 1, 2)}
    records |= {defaults.key("test_vit", "defaults", seed): {**record, "top1": 55.0} for seed in (0, 1)}
    header, _, *rows = defaults.table(records).splitlines()
    assert len(rows) == 1
    found = dict(zip(header.split("|"), rows[0].split("|"), strict=True))
    shown = {name: found[f" {name} "].strip() for name in ("arm", "last", "noise", "recovered")}
    assert shown == {"arm": "plain", "last": "53.00", "noise": "1.73", "recovered": "-"}


def test_regret_is_what_the_nearest_rate_of_the_grid_gives_away() -> None:
    case = lr_regret.Case(net="mlp7_relu", ratio=0.5, epochs=3, seeds=(0, 1))
    accuracy = dict(zip(case.grid, (10.0, 60.0, 90.0, 88.0, 80.0, 70.0, 50.0), strict=True))
    records = {case.key(lr, seed): {"top1": accuracy[lr] + seed} for lr in case.grid for seed in case.seeds}
    assert lr_regret.top1(case, records)[0.03] == 90.5
    assert lr_regret.regret(case, records, 0.02) == 0.0  # 0.03 / 0.02 is a smaller ratio than 0.02 / 0.01
    assert lr_regret.regret(case, records, 0.015) == 2.0
    assert lr_regret.regret(case, records, 5.0) == 80.0
    assert lr_regret.noise(case, records) == pytest.approx(0.5)
    assert not lr_regret.finished(case, records)
    assert not lr_regret.finished(case, {**records, str(case): {}})
    assert lr_regret.finished(case, {**records, str(case): {"trials": {}}})


def test_a_net_that_is_left_out_has_no_say_in_the_fit() -> None:
    """Both nets want another rate, whatever the steps: each must be given the other's."""
    wanted = {"mlp7_relu": 0.1, "cifar_resnet20": 0.003}
    cases = [lr_regret.Case(net=net, ratio=0.5, epochs=e, seeds=(0,)) for net in wanted for e in (1, 4)]
    known = {"steps": 5000, "distill_share": 0.0, "distill_temperature": 4.0}
    records: dict[str, Any] = {str(case): known for case in cases}
    for case in cases:
        records |= {case.key(lr, 0): {"top1": 90.0 if lr == wanted[case.net] else 50.0} for lr in case.grid}
    found = {case.net: rate for case, rate in lr_regret.left_out(cases, records).items()}
    assert found == {"mlp7_relu": 0.003, "cifar_resnet20": 0.1}
    assert lr_regret.left_out(cases[:2], records) == {}  # nothing to fit to


@pytest.mark.parametrize(
    ("net", "taught", "kind", "rates"),
    [
        ("mlp7_relu", False, "SGD", (0.3, 0.0003)),
        ("test_vit", False, "AdamW", (0.01, 0.00001)),
        ("cifar_resnet20", True, "SGD, with a teacher", (0.3, 0.0003)),
    ],
)
def test_a_case_trains_with_the_optimiser_of_its_net(
    net: str, taught: bool, kind: str, rates: tuple[float, float]
) -> None:
    case = lr_regret.Case(net=net, ratio=0.5, epochs=1, taught=taught)
    settings = case.settings(rates[0])
    assert (case.kind, case.grid[0], case.grid[-1]) == (kind, *rates)
    assert (settings.optimizer, settings.schedule.min_lr, settings.distill.share) == (
        kind.partition(",")[0].lower(),
        rates[0] / 100,
        0.9 * taught,
    )


def test_trials_choose_among_the_recommended_rate_and_the_two_below_it() -> None:
    case = {
        **dict.fromkeys(("removed_params", "removed_channels"), 0.5),
        "steps": 6000,
        "epochs": 30,
        "batch_size": 100,
        "optimizer": "sgd",
        "dense_top1": 98.0,
        "start": 40.0,
        "distill_share": 0.0,
        "distill_temperature": 4.0,
    }
    ends: dict[str, float | None] = {"0.1": 0.1, "0.03": 0.5, "0.01": 0.4, "0.003": 0.6, "0.001": 0.2}

    def choice(steps: int, losses: dict[str, float | None]) -> float:
        return lr_regret.trials({**case, "trials": {"steps": steps, "losses": losses}})

    assert lr_regret.prunecli(case) == pytest.approx(0.03)
    assert choice(100, ends) == 0.01
    assert choice(100, ends | {"0.01": None}) == 0.03
    assert choice(100, {}) == choice(9, ends) == pytest.approx(0.03)


def test_a_trial_ends_with_its_loss_on_images_it_has_not_seen_and_none_where_it_diverged() -> None:
    """Worked by hand: a linear net that starts at zero, two classes, loss ln 2 on the first step whatever the rate."""
    net = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(net.weight)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.ones(4, 1), torch.zeros(4, dtype=torch.long)

    case = lr_regret.Case(net="cifar_resnet20", ratio=0.5, epochs=1)
    found = lr_regret.trial_losses(case, net, batches, steps=600)
    assert found["steps"] == 10  # a twentieth of 600, for three trials
    assert list(found["losses"]) == ["0.3", "0.1", "0.03", "0.01", "0.003", "0.001", "0.0003"]
    first = lr_regret.trial(net, batches, [1e-9], case.settings(1e-9))
    assert first == [pytest.approx(math.log(2), rel=1e-3)]
    assert 0 < found["losses"]["0.3"] < found["losses"]["0.0003"] < math.log(2)
    assert lr_regret.trial_losses(case, net, batches, steps=59) == {"steps": 0, "losses": {}}
    taught = lr_regret.Case(net="cifar_resnet20", ratio=0.5, epochs=1, taught=True)
    assert lr_regret.trial_losses(taught, net, batches, steps=600) == {"steps": 0, "losses": {}}

    def rising() -> Iterator[tuple[Tensor, Tensor]]:
        for scale in (1.0, math.inf, 1.0):
            yield torch.full((4, 1), scale), torch.zeros(4, dtype=torch.long)

    assert lr_regret.trial(net, rising, [0.1] * 3, case.settings(0.1))[-1] is None
    assert set(lr_regret.trial_losses(case, net, rising, steps=600)["losses"].values()) == {None}


def test_a_budget_is_compared_with_the_bases_by_the_images_they_see() -> None:
    epochs = {net: lr_regret.Case(net=net, ratio=0.5, epochs=1).base_epochs for net in ("mlp7_relu", *lr_regret.CIFAR)}
    assert (epochs["mlp7_relu"], epochs["cifar_resnet56"], epochs["test_vit"]) == (270, 2000, 80)


@pytest.mark.parametrize("kind", MEASURED_REGRETS)
def test_the_regrets_that_the_tool_quotes_are_those_that_were_measured(kind: str) -> None:
    records = Ledger(lr_regret.RESULTS).records
    lines = lr_regret.table(records, kind).splitlines()
    header, means, worst = ([cell.strip() for cell in lines[at].split("|")] for at in (0, -3, -1))
    assert (means[1], worst[1], len(lines) - 5) == ("mean", "worst", MEASURED_REGRETS[kind].cases)
    fitted = "prunecli, fitted to other nets"
    quoted: dict[str, tuple[float, float]] = {fitted if fitted in header else "prunecli": MEASURED_REGRETS[kind].short}
    names = {0.01: "fixed 1e-2", 0.001: "fixed 1e-3", 1.25e-4: "published rules"}
    quoted |= {names[lr]: regret for lr, regret in MEASURED_REGRETS[kind].fixed.items()}
    assert {name: tuple(float(row[header.index(name)]) for row in (means, worst)) for name in quoted} == quoted
    steps = [records[str(c)]["steps"] for c in lr_regret.CASES if c.kind == kind and lr_regret.finished(c, records)]
    assert MEASURED_REGRETS[kind].scope.endswith(f", {min(steps)} to {max(steps):,} steps")
