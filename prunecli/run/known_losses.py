"""What was measured of a model once and stays true: scores, loss curves and whole cuts, in a folder of the cache.

The folder's name is a digest of all that they depend on: weights, images, settings and version. So nothing in it is
ever out of date; a file that cannot be read counts as missing, and a cache that cannot be written costs time alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from torch import Tensor

from prunecli import __version__
from prunecli.errors import PruneError
from prunecli.files import read_tensors, read_value, write_json, write_tensors
from prunecli.measure.calibration import Calibration
from prunecli.models.source import Source
from prunecli.models.tensors import state_digest
from prunecli.planning.cut_units import Unit
from prunecli.planning.losses import Curve
from prunecli.recipe.recipe import Recipe
from prunecli.values.groups import Graph
from prunecli.values.value import Value

log = logging.getLogger("prunecli")

CACHE: Final = "PRUNECLI_CACHE"  # environment variable with the folder of the cache; empty: none is kept
_Kept = TypeVar("_Kept", bound=Value)


class _StoredCurve(Value):
    losses: Mapping[int, float]
    measured: Mapping[int, float]
    divergences: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class KnownLosses:
    """The folder of one model with its images and settings; ``path`` may not exist yet."""

    path: Path

    def scores(self) -> dict[str, Tensor] | None:
        """Importance ``[width]`` by group name; ``None`` where it is not known."""
        if not self._scores.is_file():
            return None
        try:
            return read_tensors(self._scores)
        except PruneError as error:
            self._unreadable(error)
            return None

    def keep_scores(self, channels: Mapping[str, Tensor]) -> None:
        """Keep the importance ``[width]`` by group name."""
        try:
            write_tensors(self._scores, channels)
        except PruneError as error:
            self._unwritable(error)

    def curve(self, unit: Unit) -> Curve | None:
        """The loss curve of a unit; ``None`` where it is not known."""
        found = self.value(_StoredCurve, _curve_file(unit))
        try:
            return None if found is None else Curve(**dict(found))
        except ValueError as error:
            self._unreadable(error)
            return None

    def keep_curve(self, unit: Unit, curve: Curve) -> None:
        """Keep the loss curve of a unit."""
        stored = _StoredCurve(losses=curve.losses, measured=curve.measured, divergences=curve.divergences)
        self.keep(_curve_file(unit), stored)

    @property
    def _scores(self) -> Path:
        return self.path / "scores.safetensors"

    def value(self, kind: type[_Kept], name: str) -> _Kept | None:
        """What was kept under a name; ``None`` where nothing was."""
        if not (self.path / name).is_file():
            return None
        try:
            return read_value(kind, self.path / name)
        except PruneError as error:
            self._unreadable(error)
            return None

    def keep(self, name: str, value: Value) -> None:
        """Keep a value under the name of a file below the folder."""
        try:
            write_json(self.path / name, value.model_dump(mode="json"))
        except PruneError as error:
            self._unwritable(error)

    def _unreadable(self, error: Exception) -> None:
        log.warning("%s It is measured again.", error)

    def _unwritable(self, error: PruneError) -> None:
        log.info("%s What was measured is not kept for another time.", error)


def known_losses(
    source: Source, graph: Graph, recipe: Recipe, calibration: Calibration, *, criterion: str
) -> KnownLosses | None:
    """The folder of what is known of a model; ``None`` where no cache is kept.

    Args:
        source: the model with the weights that are scored.
        graph: its coupled groups.
        recipe: the recipe; seed, ridge and device count.
        calibration: the images that scores and curves are taken from.
        criterion: name of the criterion behind the scores.
    """
    root = _root()
    if root is None:
        return None
    depends_on = {
        "version": __version__,
        "weights": state_digest(source.model.state_dict()),
        "model": source.ref.model_dump(mode="json"),
        "input": source.spec.size,
        "engine": graph.engine,
        "groups": [(group.name, group.width) for group in graph.groups],
        "images": calibration.digest,
        "criterion": criterion,
        "seed": recipe.seed,
        "ridge": recipe.recover.ridge,
        "device": calibration.device.type,
    }
    name = source.ref.name.rpartition(":")[2].replace("/", "-")
    return KnownLosses(path=root / "sensitivity" / f"{name}-{digest(depends_on)}")


def digest(values: object) -> str:
    """A short digest of a JSON value, for the name of a file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _curve_file(unit: Unit) -> str:
    key = [[(name, list(channels)) for name, channels in unit.order.items()], list(unit.allowed)]
    return f"curves/{digest(key)}.json"


def _root() -> Path | None:
    named = os.environ.get(CACHE)
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base or Path.home() / ".cache") / "prunecli"
    except RuntimeError:  # a user without a home
        return None
