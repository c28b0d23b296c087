"""A small support matrix for the tests of its views."""

from __future__ import annotations

from prunecli.values.support_matrix import FrozenShare, Matrix, Row, Trial


def trials(error: float | None = 3e-16, problem: str | None = None) -> tuple[Trial, ...]:
    if problem:
        return (Trial(target="ratio=0.5", problem=problem), Trial(target="macs=50%", problem=problem))
    return (
        Trial(target="ratio=0.5", params=3_055_880, macs=460_000_000, relative_error=error),
        Trial(target="macs=50%", params=6_012_345, macs=907_000_000, relative_error=error),
    )


def row(name: str, module: str, **changes: object) -> Row:
    made = Row(
        name=name,
        module=module,
        model_class=module.title(),
        structure=f"digest of {name}",
        input_size=(3, 224, 224),
        params=11_689_512,
        macs=1_814_000_000,
        groups=12,
        prunable_share=0.9999,
        frozen=(FrozenShare(reason="it is an axis of the network's output (classes)", params=1000),),
        trials=trials(),
        reload_max_abs_diff=0.0,
        graph_seconds=0.25,
        graph_mib=12.5,
    )
    return made.model_copy(update=changes)


def matrix() -> Matrix:
    spatial = FrozenShare(reason="it is a spatial axis (image or feature-map positions)", params=2_300_000)
    refused = "odd_net cannot be pruned correctly: [b]why[/b]."
    return Matrix(
        date="2026-11-22",
        command="python benchmarks/coverage/support_matrix.py --work DIR",
        versions={"prunecli": "0.1.0", "torch": "2.15.0", "timm": "1.0.31"},
        rows=(
            row("gmlp_ti16_224", "mlp_mixer", prunable_share=0.8024, frozen=(spatial,)),
            row("odd_net", "resnet", trials=trials(problem=refused), reload_max_abs_diff=None),
            row("resnet18", "resnet"),
        ),
        covered_by={
            "gmlp_b16_224": "gmlp_ti16_224",
            "gmlp_ti16_224": "gmlp_ti16_224",
            "odd_net": "odd_net",
            "resnet18": "resnet18",
            "resnet34": "resnet18",
        },
    )
