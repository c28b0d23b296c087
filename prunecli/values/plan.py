"""Plan: what is cut, decided before anything is changed. Structure: what a loader must know afterwards.

Both are JSON values with a schema number that reject unknown keys and round-trip exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from prunecli.values.groups import AttributeEdit, Member, ScaleFold
from prunecli.values.value import Value

Index = Annotated[int, Field(ge=0)]


class ModelRef(Value):
    """Where a model comes from: enough to build the plain module again, without its weights."""

    name: str = Field(
        description="registered timm architecture, tag included (resnet50.a1_in1k), or package.module:function"
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments for timm.create_model or the function"
    )
    num_classes: int
    pretrained_cfg: dict[str, Any] = Field(default_factory=dict, description="input size, mean, std, interpolation …")
    timm: str = Field(description="timm version the model was built with")

    @property
    def is_function(self) -> bool:
        """Whether a user's own function makes the model. It is called only where the user names it as well."""
        return ":" in self.name

    @property
    def assumes_input_size(self) -> bool:
        """Whether such a function's image size is an assumption: neither the model nor the user declared one."""
        return self.is_function and "input_size" not in self.pretrained_cfg and "img_size" not in self.args


class Cost(Value):
    """Size of a model. MACs count one multiply-add once, attention matmuls included, for one image."""

    params: int
    macs: int
    bytes: int


class PlannedGroup(Value):
    """One coupled group as the plan leaves it."""

    name: str
    kind: Literal["channels", "heads", "head_dim"]
    width: int = Field(gt=0)
    keep: tuple[Index, ...] = Field(min_length=1, description="kept channels in dense coordinates, ascending")
    score: tuple[float, ...] | None = Field(default=None, description="importance of every channel, by the criterion")
    members: tuple[Member, ...]
    norms: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _kept_channels_exist(self) -> Self:
        if any(b <= a for a, b in zip(self.keep, self.keep[1:], strict=False)) or self.keep[-1] >= self.width:
            raise ValueError(f"group {self.name}: kept channels must be ascending, unique and below {self.width}")
        return self

    @property
    def is_cut(self) -> bool:
        """Whether any channel is removed."""
        return len(self.keep) < self.width


class UnitAllocation(Value):
    """What one unit of groups that are cut together was given, and why: its loss at every width it may have.

    Losses have no unit of their own (see `prunecli.sensitivity.measured_losses`); only their ratios mean something. At
    the optimum the next step of every unit costs about the same for what it saves, so ``marginal`` is nearly equal.
    """

    groups: tuple[str, ...]
    width: int = Field(gt=0)
    kept: int = Field(gt=0)
    loss: float = Field(description="loss at the kept width")
    marginal: float | None = Field(
        description="further loss for each per cent of the dense cost that the next step saves; null: none left"
    )
    curve: Mapping[int, float] = Field(description="loss by kept width")
    kl: Mapping[int, float] = Field(description="KL divergence in nats of cutting this unit alone, by kept width")


class Plan(Value):
    """Which indices of which coupled group stay, and why. Enough to cut the dense weights again.

    ``attributes`` and ``folds`` are what follows from the kept widths; ``base`` and ``predicted`` are the costs before
    and after, computed from the graph's size expressions.
    """

    schema_version: Literal[1] = 1
    model: ModelRef
    engine: str
    criterion: str
    ranking: str
    seed: int
    groups: tuple[PlannedGroup, ...]
    attributes: tuple[AttributeEdit, ...] = ()
    folds: tuple[ScaleFold, ...] = ()
    base: Cost
    predicted: Cost
    allocation: tuple[UnitAllocation, ...] = Field(default=(), description="with ranking loss: how widths were found")
    predicted_kl: float | None = Field(
        default=None,
        description="with ranking loss: KL divergence from the dense model's answers in nats, summed over what each "
        "unit loses alone before any training",
    )

    @property
    def cut_groups(self) -> tuple[PlannedGroup, ...]:
        """The groups that lose channels, in network order."""
        return tuple(group for group in self.groups if group.is_cut)

    @property
    def cut_norms(self) -> tuple[str, ...]:
        """Paths of the modules whose statistics run over an axis that is cut, sorted."""
        return tuple(sorted({norm for group in self.cut_groups for norm in group.norms}))

    def sha256(self) -> str:
        """Hex digest of the plan as JSON, by which a resumed run knows the plan that it began with."""
        values = self.model_dump(mode="json")
        for later in ("allocation", "predicted_kl"):
            if not getattr(self, later):
                del values[later]  # plans from before there was such a thing keep their digest
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


#: Tensor name → dimension → positions, ascending.
Positions = Mapping[str, Mapping[int, tuple[int, ...]]]


def removed_positions(groups: tuple[PlannedGroup, ...]) -> dict[str, dict[int, tuple[int, ...]]]:
    """The positions that the plan removes: surgery cuts them out, and the proof silences them.

    Args:
        groups: planned groups; uncut ones add nothing.

    Returns:
        Tensor name → dimension → removed positions in dense coordinates, ascending.
    """
    return channel_positions((group, sorted(set(range(group.width)) - set(group.keep))) for group in groups)


def channel_positions(
    channels: Iterable[tuple[PlannedGroup, Sequence[int]]],
) -> dict[str, dict[int, tuple[int, ...]]]:
    """The positions of chosen channels in all members of their groups.

    Args:
        channels: pairs of a group and chosen channels of its axis, in dense coordinates.

    Returns:
        Tensor name → dimension → positions in dense coordinates, ascending.
    """
    found: dict[str, dict[int, list[tuple[int, ...]]]] = {}
    for group, chosen in channels:
        if not chosen:
            continue
        maps = {member.index for member in group.members}
        positions = {index: tuple(sorted(index.positions(chosen))) for index in maps}
        for member in group.members:
            found.setdefault(member.tensor, {}).setdefault(member.dim, []).append(positions[member.index])
    return {tensor: {dim: _union(parts) for dim, parts in dims.items()} for tensor, dims in found.items()}


def _union(parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return parts[0] if len(parts) == 1 else tuple(sorted(set().union(*parts)))


class Structure(Value):
    """What differs from the plain model: enough, with the safetensors, to rebuild the pruned one.

    ``tensors`` maps a parameter, buffer or tensor attribute to its new shape; ``attributes`` maps a module path to the
    attributes that changed (lists stand for tuples or lists, the loader keeps the type it finds). ``extra`` names the
    tensors saved although timm's own state_dict leaves them out (cut non-persistent buffers and tensor attributes).
    """

    schema_version: Literal[1] = 1
    tensors: Mapping[str, tuple[Index, ...]] = Field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    extra: tuple[str, ...] = ()
