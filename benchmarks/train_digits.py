"""Train the small net the quickstart prunes: ResNet-20 on scikit-learn's digits, seed 0, a minute or two on one core.

    OMP_NUM_THREADS=1 python benchmarks/train_digits.py

writes prunecli/assets/cifar_resnet20_digits.safetensors (``cifar_resnet20.digits`` loads it). The recipe is that of the
CIFAR nets (He et al. 2016) with a cosine: SGD from 0.1, momentum 0.9, weight decay 5e-4. The last epoch is kept, so the
validation split chooses nothing; its accuracy goes into the file's metadata.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import timm
import torch

from prunecli.data.images import open_data
from prunecli.files import write_tensors
from prunecli.models import paper_nets
from prunecli.models.build import input_spec
from prunecli.models.load import load_model
from prunecli.recipe.schedules import CosineSchedule
from prunecli.recipe.settings import DataSettings, FinetuneSettings
from prunecli.training import finetune
from prunecli.training.loop import TrainingRun

SEED = 0
PEAK_LR = 0.1
DATA = DataSettings(name="digits", batch_size=64)
SETTINGS = FinetuneSettings(optimizer="sgd", schedule=CosineSchedule(min_lr=1e-4, warmup_epochs=1.0), weight_decay=5e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=paper_nets.ASSETS / "cifar_resnet20_digits.safetensors")
    asked = parser.parse_args()

    torch.set_num_threads(1)  # the same bits wherever it runs with the same torch
    torch.manual_seed(SEED)
    loaded = load_model("cifar_resnet20.digits", pretrained=False)
    model, images = loaded.model, open_data(DATA, input_spec(loaded.ref), num_classes=10, seed=SEED)
    report = finetune.finetune(
        model,
        images,
        SETTINGS,
        lr=PEAK_LR,
        epochs=asked.epochs,
        run=TrainingRun(
            device=torch.device("cpu"),
            seed=SEED,
            on_event=lambda event: print(json.dumps(event)) if event["event"] == "epoch" else None,
        ),
    )
    metadata = {
        "architecture": "cifar_resnet20, input 3x16x16",
        "data": "scikit-learn digits (UCI optical recognition of handwritten digits); every fifth of a class held out",
        "made_by": f"benchmarks/train_digits.py --epochs {asked.epochs}",
        "recipe": f"SGD, peak LR {PEAK_LR}, 1 epoch warm-up, cosine to 1e-4, batch 64, weight decay 5e-4",
        "seed": str(SEED),
        "top1_held_out": f"{report.last_top1:.2f}",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "license": "Apache-2.0",
    }
    write_tensors(asked.out, model.state_dict(), metadata)
    print(f"{asked.out}: {asked.out.stat().st_size:,} bytes, top-1 {report.last_top1:.2f} %")


if __name__ == "__main__":
    main()
