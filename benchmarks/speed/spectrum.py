"""Jacobian spectrum: ours against the plain loop (one backward pass a class, one SVD a sample), in one process.

All sides compute all singular values of the input-logit Jacobian of the same eval-mode model on the same images. Two
loops are timed, each with an SVD per sample (float32, ``[K, C*H*W]``): *lean* takes the gradient of each logit, summed
over the batch, by the inputs alone (the best a loop can do); *published* is the same with
``backward``, which also fills the parameters' gradients, as the code of arXiv 2105.05916 does. The sides are timed in
turn, the order reversed every repeat, after one warm-up each; the result is the median of the paired ratios with its
quartiles. The largest difference relative to the largest singular value is checked against 1e-4 (float32 SVD of wide
matrices alone rounds to about 1e-5), so that no speed is bought with accuracy.

What to expect: where the batch alone fills the processor and there are few classes (ten classes, 16 images, CPU), both
are bound by the same convolutions and equally fast; the gain comes with classes, small batches, narrow features, GPUs.

    python benchmarks/speed/spectrum.py --repeats 5 --threads 2 --out spectrum.json
    python benchmarks/speed/spectrum.py --case vit_tiny_patch16_224:224:2:1000 --device cuda

A case is ``MODEL:PIXELS:IMAGES:CLASSES`` (random weights, noise images: neither changes the work done).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import prunecli.models.paper_nets  # noqa: F401 - registers the CIFAR nets with timm
from prunecli.measure.jacobian import jacobian_spectrum

CASES = ("cifar_resnet20:32:16:10", "cifar_resnet20:32:2:10", "resnet18:64:4:100", "regnety_002:64:2:200")


def by_loop(model: nn.Module, images: Tensor, *, parameters: bool) -> Tensor:
    inputs = images.clone().requires_grad_()
    logits = model(inputs)
    wanted = [inputs, *(model.parameters() if parameters else [])]
    rows = [
        torch.autograd.grad(logits[:, k].sum(), wanted, retain_graph=True)[0].flatten(1) for k in range(logits.shape[1])
    ]
    return torch.stack([torch.linalg.svdvals(jacobian) for jacobian in torch.stack(rows, dim=1)])


def seconds(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    started = time.perf_counter()
    values = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, values


def measure(case: str, *, repeats: int, chunk: int, device: torch.device) -> dict[str, Any]:
    name, pixels, count, classes = case.split(":")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=int(classes)).eval().to(device)
    images = torch.randn(int(count), 3, int(pixels), int(pixels), device=device)
    sides: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: jacobian_spectrum(model, images, chunk=chunk).values,
        "lean": lambda: by_loop(model, images, parameters=False),
        "published": lambda: by_loop(model, images, parameters=True),
    }
    results = {side: seconds(work, device)[1].double().cpu() for side, work in sides.items()}
    error = float((results["ours"] - results["lean"]).abs().max() / results["lean"].max())
    if not error < 1e-4:
        raise SystemExit(f"{case}: the two disagree by {error:.1e} of the largest singular value")
    times: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(repeats):
        for side in list(sides) if repeat % 2 == 0 else reversed(sides):
            times[side].append(seconds(sides[side], device)[0])
    ratios = {
        side: statistics.quantiles([loop / ours for ours, loop in zip(times["ours"], times[side], strict=True)], n=4)
        for side in ("lean", "published")
    }
    return {
        "case": case,
        "median_seconds": {side: statistics.median(found) for side, found in times.items()},
        "ratio_quartiles": ratios,
        "max_rel_difference": error,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Jacobian spectrum against a per-class loop with per-sample SVD.")
    parser.add_argument("--case", action="append", help=f"MODEL:PIXELS:IMAGES:CLASSES, repeatable; default {CASES}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error("--repeats must be at least 2: a spread needs two")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"{'case':40} {'ours s':>8} {'lean/ours':>21} {'published/ours':>21} {'max diff':>9}")
    rows = []
    for case in options.case or CASES:
        row = measure(case, repeats=options.repeats, chunk=options.chunk, device=device)
        rows.append(row)
        cells = [f"{q[1]:.2f}x ({q[0]:.2f} to {q[2]:.2f})" for q in row["ratio_quartiles"].values()]
        seconds_ours = f"{row['median_seconds']['ours']:8.3f}"
        print(f"{case:40} {seconds_ours} {cells[0]:>21} {cells[1]:>21} {row['max_rel_difference']:9.0e}", flush=True)
    if options.out:
        settings = {"torch": torch.__version__, "device": str(device), "threads": options.threads}
        options.out.write_text(json.dumps({**settings, "chunk": options.chunk, "cases": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
