"""Replay: a pruned net's logits without computing again what comes before its first difference from the dense net.

Modules that are over before anything has changed answer with what they returned in the dense net. Only what the rest of
the pass reads is kept: the output of the block before, in a dense block all features so far. The other modules hand out
tensors of the right shape that hold nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunecli.measure.activations import StopPass
from prunecli.measure.dataflow import Forward, Skip, differing, replaced_forwards, trace
from prunecli.models.layers import evaluation_mode
from prunecli.models.outputs import logits_of


def copied(tensor: Tensor) -> Tensor:
    """A copy in memory of its own, with the same strides, so that kernels take the same path.

    Args:
        tensor: tensor of any shape and memory format.
    """
    if any(stride == 0 for stride in tensor.stride()):
        return tensor.clone()
    layout = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return layout.copy_(tensor)


def hollow(tensor: Tensor) -> Tensor:
    """A tensor of the same shape that takes the memory of one number: NaN, so that whoever reads it is found out.

    Args:
        tensor: tensor of any shape; integers become zeros.
    """
    filler = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), filler, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


class Replay:
    """Passes of pruned copies of one dense net over the same images.

    Bit-equal to plain passes in evaluation mode. What is skipped is over before the first tensor that differs from the
    dense net is used (``Dataflow.first_use``); where that is at the beginning, the pass is a plain one. Modules called
    several times run again, and so does what writes into what it is given.

    Memory: for each point from which a pass has started so far, the tensors that are read after it, for all images. In
    most nets that is one block output a point, and points inside one block share its input. The dense net runs once
    through, in parts as they are needed, if nets come in the order of their first differences.

    Args:
        dense: the dense net; it must not change as long as this is in use.
        batches: images ``[B, C, H, W]`` on the device of all nets.
    """

    def __init__(self, dense: nn.Module, batches: Sequence[Tensor]) -> None:
        self._dense, self._batches = dense, tuple(batches)
        self._flow = trace(dense, batches[0][:1])
        self._starts: dict[float, Skip] = {-1: Skip(needed=(), unneeded=())}  # what they need is in ``_outputs``
        self._outputs: dict[str, list[Any]] = {}  # of the modules that some pass needed, batch by batch
        self._shapes: dict[str, list[Any]] = {}  # of every module, as hollow tensors
        self._record([path for path, call in self._flow.called_once.items() if call.repeatable], self._shapes, hollow)

    def logits(self, pruned: nn.Module) -> Tensor:
        """Logits ``[N, K]`` of all images.

        Args:
            pruned: net cut from the dense one, perhaps with other weights, on the same device.
        """
        time = self._flow.first_use(differing(self._dense, pruned))
        skip = self._flow.skip(time)
        missing = [path for path in skip.needed if path not in self._outputs]
        if missing:
            self._record(missing, self._outputs, copied, since=max(start for start in self._starts if start <= time))
        self._starts[time] = skip
        return torch.cat([logits_of(self._pass(pruned, at, skip)) for at in range(len(self._batches))])

    def _record(
        self,
        paths: Sequence[str],
        into: dict[str, list[Any]],
        form: Callable[[Tensor], Tensor],
        *,
        since: float = -1,
    ) -> None:
        """Write down what modules of the dense net return, in passes that end once all have returned.

        Args:
            paths: modules that are called once.
            into: entries by path, one a batch, added here.
            form: change made to each tensor that is written down.
            since: point from which the passes start, a key of ``_starts``.
        """
        into |= {path: [] for path in paths}
        pending: set[str] = set()

        def recorded(path: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            into[path].append(tree_map_only(Tensor, form, output))
            pending.remove(path)
            if not pending:
                raise StopPass
            return output

        forwards = {path: partial(recorded, path, self._dense.get_submodule(path).forward) for path in paths}
        for at in range(len(self._batches)):
            pending.update(paths)
            with suppress(StopPass):
                self._pass(self._dense, at, self._starts[since], forwards)

    @torch.no_grad()
    def _pass(self, model: nn.Module, at: int, skip: Skip, forwards: Mapping[str, Forward] | None = None) -> Any:
        """What a net returns for batch number ``at``, with other ``forwards`` besides those that ``skip`` replaces."""
        # each call gets a copy of its own where what follows may write into it
        answers = {path: _handing_out(self._outputs[path][at], copy=True) for path in skip.needed}
        for path in skip.unneeded:
            written = self._flow.overwritten(self._flow.called_once[path])
            answers[path] = _handing_out(self._shapes[path][at], copy=written)
        with evaluation_mode(model), replaced_forwards(model, answers | dict(forwards or {})):
            return model(self._batches[at])


def _handing_out(output: Any, *, copy: bool) -> Forward:
    """A function that returns ``output`` whatever it is given."""
    return lambda *_, **__: tree_map_only(Tensor, copied, output) if copy else output
