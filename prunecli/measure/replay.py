"""Replay: a pruned net's logits without computing again what comes before its first difference from the dense net.

Modules that are over before anything has changed answer with what they returned in the dense net. Only what the rest of
the pass reads is kept: the output of the block before, in a dense block all features so far. The other modules hand out
tensors of the right shape that hold nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunecli.measure.activations import StopPass
from prunecli.measure.dataflow import Dataflow, Forward, Skip, differing, replaced_forwards, trace
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


def handing_out(output: Any, *, writable: bool) -> Forward:
    """A function that returns ``output`` whatever it is given.

    Args:
        output: tensors in plain containers.
        writable: whether each call gets a copy, because something writes into it afterwards.
    """
    return lambda *_, **__: tree_map_only(Tensor, copied, output) if writable else output


@contextmanager
def recording(
    model: nn.Module,
    paths: Collection[str],
    *,
    form: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    stop: bool = False,
) -> Iterator[dict[str, Any]]:
    """While this is open, what modules return is written down by path.

    Args:
        model: the net that holds the modules.
        paths: paths of modules that are called once in a pass.
        form: change made to each tensor at once, before what follows may write into it.
        stop: whether the pass, and with it the ``with`` block, ends when all have returned.
    """
    returned: dict[str, Any] = {}

    def recorded(path: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        returned[path] = tree_map_only(Tensor, form, output)
        if stop and len(returned) == len(paths):
            raise StopPass
        return output

    forwards: dict[str, Forward] = {path: partial(recorded, path, model.get_submodule(path).forward) for path in paths}
    with suppress(StopPass), replaced_forwards(model, forwards):
        yield returned


@torch.no_grad()
def hollow_outputs(net: nn.Module, flow: Dataflow, batches: Sequence[Tensor]) -> dict[int, dict[str, Any]]:
    """By size of a batch, what every repeatable module of a net returns, as hollow tensors.

    Args:
        net: the net.
        flow: its dataflow.
        batches: images ``[B, C, H, W]``; one batch of each size is run.
    """
    paths = [path for path, call in flow.called_once.items() if call.repeatable]
    found: dict[int, dict[str, Any]] = {}
    with evaluation_mode(net):
        for batch in batches:
            if len(batch) not in found:
                with recording(net, paths, form=hollow, stop=True) as found[len(batch)]:
                    net(batch)
    return found


def answers(flow: Dataflow, skip: Skip, outputs: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Forward]:
    """Functions that stand in for the modules that are skipped.

    Args:
        flow: dataflow of the net.
        skip: the modules that need not run.
        outputs: what those return that are read by what still runs.
        shapes: what the others return, as hollow tensors.
    """
    found = {path: handing_out(outputs[path], writable=True) for path in skip.needed}
    for path in skip.unneeded:
        found[path] = handing_out(shapes[path], writable=flow.overwritten(flow.called_once[path]))
    return found


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

    @torch.no_grad()
    def __init__(self, dense: nn.Module, batches: Sequence[Tensor]) -> None:
        self._dense, self._batches = dense, tuple(batches)
        self._flow = trace(dense, batches[0][:1])
        self._shapes = hollow_outputs(dense, self._flow, batches)
        self._outputs: list[dict[str, Any]] = [{} for _ in batches]  # batch by batch, what some pass needed
        self._starts: dict[float, Skip] = {-1: Skip(needed=(), unneeded=())}  # what they need is in ``_outputs``

    @torch.no_grad()
    def logits(self, pruned: nn.Module) -> Tensor:
        """Logits ``[N, K]`` of all images.

        Args:
            pruned: net cut from the dense one, perhaps with other weights, on the same device.
        """
        time = self._flow.first_use(differing(self._dense, pruned))
        skip = self._flow.skip(time)
        missing = [path for path in skip.needed if path not in self._outputs[0]]
        if missing:
            known = self._starts[max(start for start in self._starts if start <= time)]
            for at, held in enumerate(self._outputs):
                held.update(self._recorded(missing, known, at))
        self._starts[time] = skip
        logits = []
        with evaluation_mode(pruned):
            for at, batch in enumerate(self._batches):
                with replaced_forwards(pruned, self._answers(skip, at)):
                    logits.append(logits_of(pruned(batch)))
        return torch.cat(logits)

    def _recorded(self, paths: Collection[str], known: Skip, at: int) -> dict[str, Any]:
        """What modules of the dense net return for batch number ``at``, where those in ``known`` do not run."""
        with evaluation_mode(self._dense), replaced_forwards(self._dense, self._answers(known, at)):
            with recording(self._dense, paths, form=copied, stop=True) as returned:
                self._dense(self._batches[at])
            return returned

    def _answers(self, skip: Skip, at: int) -> dict[str, Forward]:
        """Functions that stand in for the modules of ``skip`` in batch number ``at``."""
        return answers(self._flow, skip, self._outputs[at], self._shapes[len(self._batches[at])])
