"""Prune a network of your own and use the result: ``python examples/own_model.py`` (about a minute on two CPU cores).

Any ``nn.Module`` that classifies images will do. On the command line, from this folder:

    prunecli compress own_model:tiny --data digits --target macs=50% --epochs 2 'data.input_size=[1,28,28]'
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import prunecli


def tiny(width: int = 32) -> nn.Module:
    """A small residual network for images of one channel; ten classes."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.body(x))

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(),
        Residual(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


def main(out: Path) -> None:
    """Compress to half of the multiply-adds, then load the result."""
    recipe = prunecli.Recipe.from_mapping(
        {
            "model": "own_model:tiny",
            "data": {"name": "digits", "input_size": [1, 28, 28], "mean": [0.5], "std": [0.5]},
            "target": "macs=50%",
            "finetune": {"epochs": 2},
            "spectrum": {"samples": 2},
        }
    )
    report = prunecli.compress(recipe, out=out, force=True)
    before, after = report.base, report.final
    print(f"{before['macs']:,} multiply-adds before, {after['macs']:,} after; {after['top1']:.1f} % top-1")
    model = prunecli.load(out, model=tiny)
    print(f"logits of an image: {tuple(model(torch.zeros(1, 1, 28, 28)).shape)}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/own_model"))
