"""The exported model, reloaded in a fresh process and compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import torch

from prunecli.errors import PruneError, UsageError, VerificationError
from prunecli.files import read_tensors, sha256_of
from prunecli.models.user_function import Function
from prunecli.run.export import load_exported, read_config, reference_logits, require_consent
from prunecli.run.folder import RunFolder
from prunecli.values.plan import ModelRef
from prunecli.values.report import VerifyReport

# Reloading on the machine that exported is bit-equal; another CPU or library may round a float32 sum differently.
_VERIFY_TOLERANCE: Final = 1e-3


# ---------------------------------------------------------------------------------------------- verify


def verify(path: Path, function: Function | None = None) -> VerifyReport:
    """Reload the exported model in a fresh process and compare logits, class count and bytes.

    Args:
        path: the run folder.
        function: what made the model, where it was a function of the user's; the process finds what this one finds.

    Raises:
        UsageError: no such folder; the function is missing, is another one, or fails.
        VerificationError: it does not reload to what was exported, with the reason.
    """
    if not path.is_dir():
        raise UsageError(f"{path} does not exist or is no folder.")
    if (ref := _recorded_model(path)) is not None:
        require_consent(path, ref, function)
    # -P and PYTHONPATH: the child gets this very package, and no module that happens to lie in the user's folder.
    command = [sys.executable, "-P", "-m", "prunecli.run.verify", str(path.resolve())]
    places = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    if function is not None:
        command += [function.name, json.dumps(dict(function.args))]
        places += [os.path.abspath(place) for place in sys.path]  # noqa: PTH100 - text in, text out
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(  # noqa: S603 our own interpreter
        command, capture_output=True, text=True, check=False, env=environment
    )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise VerificationError(f"{path} could not be reloaded in a fresh process: {last[0]}") from None
    if answer.get("usage"):
        raise UsageError(answer["error"])
    if "error" in answer:
        raise VerificationError(f"{path} does not verify: {answer['error']}")
    result = VerifyReport.model_validate(answer)
    if not result.ok:
        raise VerificationError(
            f"{path} reloads to another model: logits differ by {result.reload_max_abs_diff:.3g}"
            + ("" if result.classes_equal else " and the class count changed")
            + "."
        )
    return result


def _recorded_model(path: Path) -> ModelRef | None:
    """What the config says, None where it cannot be read: the fresh process will say why."""
    try:
        return read_config(path).model
    except PruneError:
        return None


def verify_here(path: Path, function: Function | None = None) -> VerifyReport:
    """The comparison itself, in this process. Raises PruneError."""
    exported = read_config(path)
    run = RunFolder(path=path)
    weights = run.weights_file
    if not weights.is_file():
        raise PruneError(f"{weights} is missing.")
    if weights.stat().st_size != exported.weights_bytes or sha256_of(weights) != exported.weights_sha256:
        raise PruneError(f"{weights} is not the file that was exported (size or digest differ).")
    reference = read_tensors(run.reference_file).get("logits")
    if reference is None:
        raise PruneError(f"{run.reference_file} holds no logits.")
    model, _ = load_exported(path, function)
    logits = reference_logits(model, exported.model)
    classes = exported.model.num_classes
    classes_equal = logits.shape == reference.shape and classes in {0, logits.shape[-1]}
    difference = float((logits - reference).abs().max()) if logits.shape == reference.shape else float("inf")
    scale = float(reference.abs().max())
    close = difference <= _VERIFY_TOLERANCE * scale
    return VerifyReport(
        reload_max_abs_diff=difference if difference < float("inf") else -1.0,
        classes_equal=classes_equal,
        ok=close and classes_equal and bool(torch.isfinite(logits).all()),
    )


def _main(path: str, name: str | None = None, args: str = "{}") -> None:
    """Entry of the fresh process: one JSON line on stdout."""
    function = Function(name=name, args=json.loads(args)) if name else None
    try:
        answer = verify_here(Path(path), function).model_dump()
    except PruneError as error:
        answer = {"error": str(error), "usage": isinstance(error, UsageError)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
