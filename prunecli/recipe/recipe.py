"""Recipe: what the user asks for, from YAML, ``KEY=VALUE`` and flags. Frozen, validated as a whole, no torch.

Precedence is flag > ``KEY=VALUE`` > recipe file > default; ``layered`` merges, ``Recipe.from_mapping`` validates,
and all mistakes are reported at once, each with its full key and the nearest known one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from prunecli.errors import UsageError
from prunecli.recipe.methods import Init, Method, OneshotMethod
from prunecli.recipe.mistakes import explained
from prunecli.recipe.moved_keys import without_moved_keys
from prunecli.recipe.reading import read_yaml
from prunecli.recipe.settings import (
    DataSettings,
    FinetuneSettings,
    PruneSettings,
    RecoverSettings,
    SpectrumSettings,
)
from prunecli.recipe.target import Target
from prunecli.values.value import Value


class Recipe(Value):
    """A whole job. Running the resolved recipe again repeats it."""

    model: str | None = Field(
        default=None,
        description="timm name, hf-hub:owner/name, local-dir:PATH, package.module:function or a run folder",
    )
    function: str | None = Field(
        default=None,
        description="package.module:function that made the run which `model` names; it is called to load the run",
    )
    weights: str | None = Field(default=None, description="file of weights: .safetensors, .pth, .pth.tar or .bin")
    pretrained: bool = Field(default=True, description="false: start from random weights")
    model_args: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments for timm.create_model, or the function"
    )
    data: DataSettings = DataSettings()
    target: Target | None = Field(
        default=None, description="what is to be left: macs=50%, speedup=2, params=10M, size=20MB or ratio=0.3"
    )
    method: Method = Field(
        default=OneshotMethod(),
        description="what happens before the cut: a training phase, with oneshot nothing; abp learns which channels "
        "leave, and how many where there is no target; epsd ranks them by what they are worth to the first steps of "
        "the fine-tuning to come",
    )
    init: Init | None = Field(
        default=None,
        description="sao: what is trained starts from sparse orthogonal weights, with pretrained: false",
    )
    prune: PruneSettings = PruneSettings()
    recover: RecoverSettings = RecoverSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    spectrum: SpectrumSettings = SpectrumSettings()
    device: str = Field(default="auto", description="auto, cpu or cuda[:N]")
    seed: int = Field(default=0, ge=0, description="seed of all random numbers")
    equivalence_check: bool = Field(
        default=True, description="prove the cut against the silenced dense net before any work"
    )

    @field_validator("target", mode="before")
    @classmethod
    def _target_text(cls, value: object) -> object:
        if isinstance(value, str):
            try:
                return Target.parse(value)
            except UsageError as error:
                raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.weights is not None and not self.pretrained:
            raise ValueError("weights and pretrained: false contradict each other; leave one out")
        if self.init is not None:
            self._starts_anew(self.init.kind)
        if self.data.input_size and (twice := {"img_size", "in_chans"} & self.model_args.keys()):
            raise ValueError(f"data.input_size and the model argument {min(twice)} both set the input; leave one out")
        ranked_by = {"abp": "their gates", "epsd": "the steps it takes"}.get(self.method.kind)
        if ranked_by and self.prune.criterion not in {"auto", "l1"}:
            raise ValueError(
                f"method {self.method.kind} ranks channels by {ranked_by}; leave out prune.criterion "
                f"{self.prune.criterion}"
            )
        return self

    def _starts_anew(self, init: str) -> None:
        """Raises ValueError where what the start forgets was asked for."""
        if self.pretrained or self.weights is not None:
            raise ValueError(f"init {init} trains from scratch, so it needs pretrained: false and no weights")
        if self.method.kind != "oneshot":
            raise ValueError(f"init {init} would forget what method {self.method.kind} trains; leave one out")
        if self.finetune.epochs == 0:
            raise ValueError(f"init {init} is the start of a training, and finetune.epochs is 0")

    # -------------------------------------------------------------------------------------------- reading

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, origin: str = "recipe") -> Self:
        """Validate a nested mapping.

        Raises:
            UsageError: Names every wrong key (with the nearest known one), every key that has moved (with the new one)
                and every wrong value, all at once.
        """
        kept, problems = without_moved_keys(values)
        try:
            recipe = cls.model_validate(kept)
        except ValidationError as error:
            problems += explained(cls, error.errors())
        if problems:
            raise UsageError(f"{origin}: {'; '.join(problems)}")
        return recipe

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read one YAML file. Raises UsageError where it is missing, unreadable or wrong."""
        return cls.from_mapping(read_yaml(Path(path)), origin=str(path))

    # -------------------------------------------------------------------------------------------- writing

    def to_mapping(self) -> dict[str, Any]:
        """Plain YAML-able values that validate back to this recipe."""
        values: dict[str, Any] = self.model_dump(mode="json")
        values["target"] = str(self.target) if self.target else None
        return values

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_mapping(), sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        """Identity of the job: equal recipes have equal digests whatever the order of their keys."""
        return hashlib.sha256(json.dumps(self.to_mapping(), sort_keys=True).encode()).hexdigest()
