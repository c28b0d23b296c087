"""A made-up but plausible run of a ResNet-20, with names that would break careless rendering."""

from __future__ import annotations

import math

from prunecli.values.groups import Member
from prunecli.values.learning_rate import FinetuneSituation, LRReport, Rule
from prunecli.values.plan import Cost, ModelRef, Plan, PlannedGroup, UnitAllocation
from prunecli.values.report import (
    FinetuneReport,
    LayerReport,
    PhaseReport,
    RecoveryStep,
    Report,
    SpectrumSummary,
    Stage,
    TargetResult,
    VerifyReport,
)

DENSE = Cost(params=272_474, macs=41_214_000, bytes=1_098_200)
PRUNED = Cost(params=141_306, macs=20_583_000, bytes=573_528)
BLOCKS = [(stage, block, 16 * 2 ** (stage - 1)) for stage in (1, 2, 3) for block in range(3)]


def summary(mean: float, low: float, high: float, condition: float | None) -> SpectrumSummary:
    return SpectrumSummary(mean=mean, std=mean / 2, min=low, max=high, condition=condition, samples=16)


def stages() -> tuple[Stage, ...]:
    dense = Stage(name="dense", seconds=4.2, **DENSE.model_dump(), top1=91.5, top5=99.6, loss=0.3124)
    small = PRUNED.model_dump()
    return (
        dense.model_copy(update={"jsv": summary(16.2, 0.01, 58.1, 2034.0)}),
        Stage(name="pruned", seconds=3.1, **small, top1=9.3, top5=49.8, loss=6.71, jsv=summary(3.3, 0.002, 21.0, 2159)),
        Stage(name="recovered", seconds=21.4, **small, top1=21.6, top5=71, loss=3.02, jsv=summary(23, 0.014, 80, None)),
        Stage(name="finetuned", seconds=754.0, **small, top1=89.92, top5=99.5, loss=0.37, jsv=summary(18, 0, 66, 1900)),
    )  # fmt: skip


def layers() -> tuple[LayerReport, ...]:
    found = [layer("conv1", 16, 16)]
    for stage, block, width in BLOCKS:
        found.append(layer(f"layer{stage}.{block}.conv1", width, width // 2))
        found.append(layer(f"layer{stage}.{block}.conv2", width, width))
    return (*found, layer("<fc & [b]head[/b]>", 10, 10))


def layer(name: str, before: int, after: int) -> LayerReport:
    decay = [3 * math.exp(-4 * place / before) for place in range(before)]
    return LayerReport(
        name=name,
        out_before=before,
        out_after=after,
        sv_before=tuple(decay),
        sv_after=tuple(1.3 * value for value in decay[:after]),
    )


def history() -> tuple[dict[str, float], ...]:
    return tuple(
        {
            "epoch": float(epoch),
            "lr": 0.01 * (1 + math.cos(math.pi * epoch / 10)) / 2 + 1e-4,
            "train_loss": 1.6 * math.exp(-epoch / 3) + 0.3,
            "loss": 1.3 * math.exp(-epoch / 3) + 0.36,
            "top1": 90 - 35 * math.exp(-epoch / 3),
            "seconds": 75.0,
        }
        for epoch in range(1, 11)
    )


def phases() -> tuple[PhaseReport, PhaseReport]:
    """Ten epochs of a penalty on all channels, then TPP; the last entry is zero, which no logarithm has."""
    grow = tuple({"epoch": float(e), "step": 390.0 * e, "reg": e / 1000, "norm": 30.0 - e} for e in range(11))
    push = tuple(
        {"epoch": float(e), "step": 390.0 * e, "reg": min(1.0, e / 25), "penalty": 0.394 / 2**e, "norm": 16.2 / 1.2**e}
        | ({"train_loss": 0.1 + e / 100} if e else {})
        for e in range(31)
    )
    last = {**push[-1], "epoch": 31.0, "norm": 0.0, "penalty": 0.0}
    shared = {"method": "tpp", "lr": 1e-3, "seconds": 900.0}
    return (
        PhaseReport(name="grow", steps=3_900, epochs=10, norm_before=30, norm_after=20, history=grow, **shared),
        PhaseReport(
            name="push",
            steps=12_000,
            epochs=30.77,
            reg=1.0,
            norm_before=16.2,
            norm_after=0,
            penalty_before=0.394,
            penalty_after=0,
            history=(*push, last),
            **shared,
        ),
    )


def report(**changes: object) -> Report:
    dropped = RecoveryStep(
        name="orthp",
        kept=False,
        rule="left out: held-out loss after 30 optimiser steps at LR 0.01 is 1.92 with it, 1.41 without it",
        loss_before=3.02,
        loss_after=2.7,
        top1_before=21.6,
        top1_after=13.4,
        jsv_before=summary(23, 0.014, 80, 2458),
        jsv_after=summary(2.3, 0.71, 9, 4.2),
        residual=3e-7,
        seconds=9.0,
    )
    kept = RecoveryStep(
        name="bn",
        kept=True,
        rule="kept: held-out loss after 30 optimiser steps at LR 0.01 is 1.41 with it, 1.53 without it",
        kl_before=4.97,
        kl_after=1.06,
        loss_before=6.71,
        loss_after=3.02,
        top1_before=9.3,
        top1_after=21.6,
        seconds=12.4,
    )
    values: dict[str, object] = {
        "model": "cifar_resnet20",
        "base": DENSE.model_dump(),
        "final": PRUNED.model_dump(),
        "stages": stages(),
        "target": TargetResult(metric="macs", asked=20_607_000, reached=20_583_000, reachable=(9_800_000, 41_214_000)),
        "layers": layers(),
        "recovery": (kept, dropped),
        "lr": LRReport(
            recommended=0.01,
            rule="A tenth of the base's peak rate 0.1 (assumed, since the base's own rate is not recorded) is 0.01.",
            inputs=FinetuneSituation.model_construct(optimizer="sgd", removed_channels=0.3333, base_peak_lr=None),
            rules=(
                Rule(
                    name="peak",
                    lr=0.01,
                    reason="A tenth of the base's peak rate 0.1 is 0.01.",
                    source="arXiv 2207.12534; arXiv 2301.05219",
                ),
            ),
        ),
        "finetune": FinetuneReport(
            epochs=10,
            steps=3910,
            lr=0.01,
            schedule="cosine",
            best_epoch=9,
            best_top1=89.95,
            last_top1=89.92,
            history=history(),
        ),
        "verify": VerifyReport(reload_max_abs_diff=0.0, classes_equal=True, ok=True),
        "recipe_sha256": "0f" * 32,
        "versions": {"prunecli": "0.1.0", "torch": "2.6.0", "timm": "1.0.20"},
        "seed": 0,
        "warnings": ("2 images were unreadable and left out: <script>alert(1)</script>.png.",),
    }
    return Report.model_validate(values | changes)


def plan() -> Plan:
    groups = [
        PlannedGroup(
            name=f"layer{stage}.{block}.conv1",
            kind="channels",
            width=width,
            keep=tuple(range(0, width, 2)),
            members=(Member(tensor=f"layer{stage}.{block}.conv1.weight", dim=0, role="out"),),
        )
        for stage, block, width in BLOCKS
    ]
    whole = PlannedGroup(name="conv1", kind="channels", width=16, keep=tuple(range(16)), members=())
    return Plan(
        model=ModelRef(name="cifar_resnet20", num_classes=10, timm="1.0.20"),
        engine="axes",
        criterion="l1",
        ranking="local",
        seed=0,
        groups=(whole, *groups),
        base=DENSE,
        predicted=PRUNED,
        allocation=tuple(
            UnitAllocation(
                groups=(group.name,),
                width=group.width,
                kept=group.width // 2,
                loss=0.01 * (place + 1),
                marginal=0.004,
                curve={kept: 0.01 * (place + 1) * (group.width - kept) ** 2 * 4 / group.width**2
                       for kept in range(0, group.width + 1, group.width // 8) if kept},
                kl={group.width // 2: 0.02 * (place + 1)},
            )
            for place, group in enumerate(groups)
        ),
    )  # fmt: skip


def jacobians() -> dict[str, tuple[float, ...]]:
    """160 singular values a stage, log-normal about the stage's mean."""
    return {
        str(stage.name): tuple(
            stage.jsv.mean * math.exp(1.5 * math.sin(12.9898 * k + 78.233 * place)) for k in range(160)
        )
        for place, stage in enumerate(stages())
        if stage.jsv
    }
