"""The papers' tables are trained by loops of their own; here they are held to the tool's trainer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from prunecli.data import epoch_order
from prunecli.recipe import FinetuneSettings
from prunecli.train import finetune
from prunecli.zoo import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from side_by_side import Arm, SideBySide, Split, stacked_logits

CPU = torch.device("cpu")
PAPERS = FinetuneSettings(optimizer="sgd", schedule="step", milestones=(0.5,), weight_decay=1e-2, decay_norms=True)


class Noise:
    """Images of noise in batches of eight, the last one smaller, in the order that ``data.Images`` would take."""

    num_classes = 10
    steps_per_epoch = 3

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(20, 1, 32, 32, generator=generator)
        self.labels = torch.randint(0, 10, (20,), generator=generator)
        self.seed = seed

    def train_loader(self, *, epoch: int, skip_batches: int = 0) -> DataLoader[Any]:
        order = epoch_order(20, seed=self.seed, epoch=epoch)[8 * skip_batches :].tolist()
        return DataLoader(TensorDataset(self.images, self.labels), sampler=order, batch_size=8)

    def val_loader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.images, self.labels), batch_size=8)

    def calibration(self, count: int) -> tuple[Tensor, Tensor]:
        return self.images[:count], self.labels[:count]


def tool_run(net: str, start: dict[str, Tensor], *, seed: int, lr: float) -> tuple[dict[str, Tensor], float]:
    model = load_model(net, pretrained=False).model
    model.load_state_dict(start)
    report = finetune(model, Noise(seed), PAPERS, lr=lr, epochs=2, device=CPU, seed=seed)
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
