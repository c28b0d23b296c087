"""The Lanczos estimate of the Jacobian spectrum: how far it is off, against what it says, and what it costs.

    python benchmarks/speed/spectrum_estimate.py --threads 2 --seeds 100
    python benchmarks/speed/spectrum_estimate.py --case vit_base_patch16_224:224:4:1000 --device cuda

A case is ``MODEL:PIXELS:IMAGES:CLASSES`` (random weights, noise images). Where ``--exact`` names a case as well, the
exact spectrum is taken once and compared with the estimates from ``--seeds`` different random vectors: deviations of
the mean in units of the standard error that each estimate states (a fair one is below 1 in two of three cases and below
2 in 19 of 20), and the largest and smallest value relative to the exact ones.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch
from torch import Tensor, nn

import prunecli.models.paper_nets  # noqa: F401 - registers the CIFAR nets with timm
from prunecli.measure.jacobian import jacobian_estimate, jacobian_spectrum

EXACT = ("resnet18:64:4:100", "regnety_002:64:2:200")
LARGE = ("resnet50:224:8:1000",)


def built(case: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    name, pixels, count, classes = case.split(":")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=int(classes)).eval().to(device)
    return model, torch.randn(int(count), 3, int(pixels), int(pixels)).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="only timed; repeatable")
    parser.add_argument("--exact", action="append", help="compared with the exact spectrum; repeatable")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    given = options.case or options.exact
    print("| model : pixels : images : classes | seconds | processor seconds | mean | stated error | "
          "within 1, 2 stated errors | max / exact | min / exact |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for case in (options.exact or []) if given else EXACT:
        model, images = built(case, device)
        exact = jacobian_spectrum(model, images).summary
        started, used = time.perf_counter(), time.process_time()
        found = [
            jacobian_estimate(model, images, steps=options.steps, seed=seed).summary for seed in range(options.seeds)
        ]
        wall, used = (time.perf_counter() - started) / len(found), (time.process_time() - used) / len(found)
        error = statistics.fmean(summary.mean_error or 0.0 for summary in found)
        off = [abs(summary.mean - exact.mean) / (summary.mean_error or 1.0) for summary in found]
        top = statistics.median(summary.max / exact.max for summary in found)
        low = statistics.median(summary.min for summary in found)
        least = f"{low / exact.min:.2f}" if exact.min else "rank-deficient"
        within = ", ".join(f"{statistics.fmean(error < limit for error in off):.0%}" for limit in (1, 2))
        print(f"| {case} | {wall:.1f} | {used:.1f} | {exact.mean:.4g} | {error / exact.mean:.1%} | "
              f"{within} of {len(off)} | {top:.4f} | {least} |",
              flush=True)  # fmt: skip
    for case in (options.case or []) if given else LARGE:
        model, images = built(case, device)
        started, used = time.perf_counter(), time.process_time()
        summary = jacobian_estimate(model, images, steps=options.steps).summary
        wall, used = time.perf_counter() - started, time.process_time() - used
        error = (summary.mean_error or 0.0) / summary.mean
        print(f"| {case} | {wall:.1f} | {used:.1f} | {summary.mean:.4g} | {error:.1%} | | | |", flush=True)


if __name__ == "__main__":
    main()
