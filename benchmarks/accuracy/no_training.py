r"""What a cut keeps before any training: top-1 and KL to the dense net, for nets x targets x arms x calibration splits.

    OMP_NUM_THREADS=1 python benchmarks/accuracy/no_training.py --train-nets DIR --data-dir CIFAR
    OMP_NUM_THREADS=1 python benchmarks/accuracy/no_training.py --work DIR --data-dir CIFAR --checkpoints DIR \
        --photographs DIR --arms tp before
    … --arm new "prune.criterion=… prune.ranking=… recover.steps=[auto]"
    python benchmarks/accuracy/no_training.py --table

Nets and images: ``shared/subjects.py``. An arm is a job of ``prunecli compress`` with these changes of the recipe and
no epochs, judged by its exported net; a seed is a calibration split of its own, since it draws the calibration images.
KL is the mean of KL(dense || cut) over the test images, in nats. Targets of multiply-adds stand beside those of
parameters because a cut that keeps parameters looks better than it is at equal multiply-adds.

* ``before``: L1, equal shares, least squares and BatchNorm re-estimation.
* ``tp``: Torch-Pruning's own pruner as it comes (L1, equal shares; heads as in its example), at the ratio whose cost is
  nearest to the target (in the CIFAR ResNets only the first layer of each block, since it does not follow their padded
  shortcuts); ``tp-best``: its other criteria too, of which the table shows the one with the highest top-1.
  Gradients are those of 256 labelled calibration images; one split only, as most criteria read no images. A cut that
  raises, or whose net does not run, is recorded with the reason.

Seconds are processor time of this process: of a job as a whole, its own measurements on 100 test images included; of
Torch-Pruning's cut with the search for the ratio. Judging is not in them. Finished rows are in the results file and not
run again.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # run as a program, from any folder
    sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from benchmarks.shared.ledger import Ledger
from benchmarks.shared.papers import row
from benchmarks.shared.subjects import (
    ARMS,
    BEFORE,
    Subject,
    add_sources,
    own_arms,
    recipe_of,
    silence_,
    subject,
    train_missing,
)
from benchmarks.shared.torch_pruning_cut import CRITERIA, loss_gradients, nearest_cut
from prunecli.data.images import Images, open_data
from prunecli.errors import PruneError, one_line
from prunecli.measure import cost
from prunecli.measure.accuracy import answers
from prunecli.measure.divergence import as_log_probabilities, divergences
from prunecli.models.source import Source
from prunecli.recipe.target import Target
from prunecli.run import pipeline
from prunecli.run.export import load
from prunecli.run.source import load_source, open_images

RESULTS = Path(__file__).parents[1] / "results" / "no_training.json"
TP, TP_BEST = "tp", "tp-best"
THEIRS = {TP if name == "l1" else f"{TP}-{name}": criterion for name, criterion in CRITERIA.items()}
OWN = {"finetune": {"epochs": 0}, "data": {"val_limit": 100}}  # the job's own measurements need no more
GRADIENT_IMAGES = 256


def key(net: str, target: str, arm: str, seed: int) -> str:
    """The name of one row's record."""
    return f"{net}/{target}/{arm}/seed={seed}"


# ---------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True, kw_only=True)
class Test:
    """Test images, and the dense net's answers to them.

    Attributes:
        images: images whose validation split is the test.
        dense: dense net.
        device: device of the forward passes.
    """

    images: Images
    dense: nn.Module
    device: torch.device

    @cached_property
    def wanted(self) -> Tensor:
        """Logits ``[N, K]`` of the dense net."""
        return answers(self.dense, self.images.val_loader(), device=self.device)[0]

    def judged(self, net: nn.Module) -> dict[str, float]:
        """Top-1 in percent, and KL to the dense net in nats."""
        logits, labels = answers(net, self.images.val_loader(), device=self.device)
        top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
        return {"top1": round(top1, 3), "kl": float(f"{divergence(self.wanted, logits):.4g}")}


def divergence(dense: Tensor, pruned: Tensor) -> float:
    """Mean KL(dense || pruned) of two nets' answers, in nats.

    Args:
        dense: logits ``[N, K]``.
        pruned: logits ``[N, K]``.
    """
    return divergences(as_log_probabilities(dense), as_log_probabilities(pruned)).mean().item()


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One net with its images, opened."""

    subject: Subject
    source: Source
    test: Test
    unseen: Test | None

    @classmethod
    def of(cls, net: str, asked: argparse.Namespace) -> Bench:
        """Load the net and open its images."""
        found, device = subject(net, asked), torch.device(asked.device)
        source = load_source(found.recipe)
        images = open_images(found.recipe, source)
        assert images is not None
        unseen = None
        if found.unseen is not None:
            more = open_data(found.unseen, source.spec, num_classes=source.ref.num_classes, seed=0)
            unseen = Test(images=more, dense=source.model, device=device)
        test = Test(images=images, dense=source.model, device=device)
        return cls(subject=found, source=source, test=test, unseen=unseen)

    def judged(self, net: nn.Module) -> dict[str, Any]:
        """What the net keeps on test images and on unseen ones, and the shares of the dense cost that it has."""
        size = cost.measure(net, self.source.spec.size)
        unseen = {f"unseen_{name}": value for name, value in self.unseen.judged(net).items()} if self.unseen else {}
        shares = {name: getattr(size, name) / getattr(self.source.cost, name) for name in ("macs", "params")}
        return {**self.test.judged(net), **unseen, **{name: round(share, 4) for name, share in shares.items()}}


# ---------------------------------------------------------------------------------------------- arms


def ours(bench: Bench, target: str, seed: int, changes: Sequence[str]) -> dict[str, Any]:
    """The job as a user would run it."""
    recipe = recipe_of(bench.subject.recipe, target, seed, changes, OWN)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.process_time()
        report = pipeline.compress(recipe, out=Path(scratch) / "run")
        spent = time.process_time() - began
        net = load(Path(scratch) / "run")
    kept = [step.name for step in report.recovery if step.kept]
    return {**bench.judged(net), "seconds": round(spent, 1), "kept": kept, "set": list(changes)}


def theirs(bench: Bench, target: str, seed: int, arm: str) -> dict[str, Any]:
    """Torch-Pruning's cut."""
    criterion, goal = THEIRS[arm], Target.parse(target)
    assert goal.relative
    assert goal.metric in ("macs", "params")
    began = time.process_time()
    gradients = None
    if criterion.gradients:
        images = open_images(bench.subject.recipe.model_copy(update={"seed": seed}), bench.source)
        assert images is not None
        gradients = loss_gradients(bench.source.model, *images.calibration(GRADIENT_IMAGES))
    try:
        net, ratio = nearest_cut(
            bench.source.model,
            bench.source.spec.size,
            goal.value,
            metric=goal.metric,
            criterion=criterion,
            gradients=gradients,
            whole=bench.subject.whole,
        )
    except Exception as reason:
        return {"problem": one_line(reason)}
    spent = time.process_time() - began
    return {**bench.judged(net), "seconds": round(spent, 1), "ratio": round(ratio, 4)}


def measure(bench: Bench, target: str, arm: str, seed: int, changes: Sequence[str]) -> dict[str, Any]:
    """One row."""
    if arm in THEIRS:
        return theirs(bench, target, seed, arm)
    try:
        return ours(bench, target, seed, changes)
    except PruneError as reason:
        return {"problem": one_line(reason), "set": list(changes)}


def seeds_of(arm: str, seeds: Sequence[int]) -> Sequence[int]:
    """The calibration splits that an arm is measured with: the first alone for Torch-Pruning."""
    return seeds[:1] if arm in THEIRS else seeds


def arms_of(asked: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """The arms that were asked for: changes of the recipe by name, none for Torch-Pruning's."""
    named = itertools.chain.from_iterable(THEIRS if arm == TP_BEST else (arm,) for arm in asked.arms)
    return {**{arm: ARMS.get(arm, ()) for arm in named}, **own_arms(asked)}


def run(asked: argparse.Namespace, arms: Mapping[str, Sequence[str]], ledger: Ledger) -> None:
    """Measure what the ledger lacks, net by net."""
    for net in asked.nets:
        rows = itertools.product(asked.targets, arms)
        wanted = [(target, arm, seed) for target, arm in rows for seed in seeds_of(arm, asked.seeds)]
        missing = [each for each in wanted if key(net, *each) not in ledger.records]
        if not missing:
            continue
        bench = Bench.of(net, asked)
        ledger.add({f"{net}/dense": dense_record(bench)}, device=torch.device(asked.device))
        for target, arm, seed in missing:
            name = key(net, target, arm, seed)
            ledger.add({name: measure(bench, target, arm, seed, arms[arm])}, device=torch.device(asked.device))
            print(name, ledger.records[name], flush=True)


def dense_record(bench: Bench) -> dict[str, Any]:
    """The dense net: what it knows, and what it costs."""
    size = bench.source.cost
    return {**bench.judged(bench.source.model), "total_macs": size.macs, "total_params": size.params}


# ---------------------------------------------------------------------------------------------- the table


def table(records: Mapping[str, Any], nets: Sequence[str], targets: Sequence[str]) -> str:
    """Markdown: a line a net and target, a cell an arm, its mean over the calibration splits."""
    found = list(dict.fromkeys(name.split("/")[2] for name in records if name.count("/") == 3))
    own = sorted((arm for arm in found if arm not in THEIRS), key=lambda arm: (arm != BEFORE, arm))
    lines = [row(["net (dense)", "target", TP, TP_BEST, *own]), row(["---"] * (4 + len(own)))]
    for net, target in itertools.product(nets, targets):
        if not any(name.startswith(f"{net}/{target}/") for name in records):
            continue
        per_arm = {arm: list(runs(records, net, target, arm)) for arm in found}
        rivals = {arm: per_arm[arm] for arm in per_arm if arm in THEIRS and per_arm[arm]}
        best = max(rivals, key=lambda arm: mean(rivals[arm]), default=TP)
        named = f" ({best.removeprefix(f'{TP}-')})" if best != TP else ""
        theirs_best = cell(rivals[best]) + named if len(rivals) > 1 else "not run"
        shown = [cell(per_arm.get(TP, ())), theirs_best]
        shown += [cell(per_arm[arm]) for arm in own]
        lines.append(row([titled(net, records.get(f"{net}/dense")), target, *shown]))
    return "\n".join(lines)


def runs(records: Mapping[str, Any], net: str, target: str, arm: str) -> Iterator[Mapping[str, Any]]:
    """The records of an arm, a seed each."""
    return (record for name, record in records.items() if name.startswith(f"{net}/{target}/{arm}/seed="))


def mean(found: Sequence[Mapping[str, Any]], name: str = "top1") -> float:
    """Mean over the records that have a figure; minus infinity where none has it."""
    values = [record[name] for record in found if name in record]
    return statistics.fmean(values) if values else float("-inf")


def cell(found: Sequence[Mapping[str, Any]]) -> str:
    """``top-1 / KL; unseen top-1; shares left``, with half the distance of the splits behind the top-1."""
    if not found:
        return "not run"
    if any("problem" in record for record in found):
        return "fails"
    values = [record["top1"] for record in found]
    apart = f"±{(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    unseen = f"; {mean(found, 'unseen_top1'):.1f}" if "unseen_top1" in found[0] else ""
    left = f"{mean(found, 'macs'):.0%} MACs, {mean(found, 'params'):.0%} par."
    return f"{mean(found):.1f}{apart} / {mean(found, 'kl'):.3g}{unseen}; {left}"


def titled(net: str, dense: Mapping[str, Any] | None) -> str:
    """The net with the top-1 of the dense one."""
    if dense is None:
        return net
    unseen = f"; {dense['unseen_top1']:.1f}" if "unseen_top1" in dense else ""
    return f"{net} ({dense['top1']:.1f}{unseen})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser, arms=(TP, TP_BEST, *ARMS), results=RESULTS)
    asked = parser.parse_args()
    ledger = Ledger(asked.results)
    if asked.table:
        print(table(ledger.records, asked.nets, asked.targets))
        return
    silence_()
    if asked.train_nets:
        train_missing(asked)
        return
    run(asked, arms_of(asked), ledger)


if __name__ == "__main__":
    main()
