"""A walk through a net: passes over the same images that each go on from where the last one ended.

Layers ahead of the present point may be changed meanwhile. So a net can be worked on layer by layer, each layer seeing
what the finished ones before it give, at the price of about one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunecli.measure.activations import StopPass
from prunecli.measure.dataflow import Forward, Skip, replaced_forwards, trace
from prunecli.measure.replay import copied, hollow
from prunecli.models.layers import evaluation_mode


class Walk:
    """A net on its way through one forward pass over all images, batch by batch.

    Memory: what is read from the present point on, for all images: in most nets one or two activations.

    Args:
        net: the net; tensors that are used from the present point on may change, its architecture may not.
        batches: images ``[B, C, H, W]`` on the net's device.
    """

    def __init__(self, net: nn.Module, batches: Sequence[Tensor]) -> None:
        self._net, self._batches = net, batches
        self._flow = trace(net, batches[0][:1])
        self._skip = Skip(needed=(), unneeded=())
        self._outputs: list[dict[str, Any]] = [{} for _ in batches]
        self._shapes: dict[int, dict[str, Any]] = {}  # by size of a batch: what modules return, as hollow tensors
        repeatable = [path for path, call in self._flow.called_once.items() if call.repeatable]
        for at, batch in enumerate(batches):
            if len(batch) not in self._shapes:
                self._shapes[len(batch)] = self._returned(at, repeatable, hollow)

    def inputs(self, path: str) -> list[Tensor]:
        """What a module is given, batch by batch; the walk goes on to where the module begins.

        Args:
            path: path of a module that is called once, ahead of the present point.
        """
        self._go_to(self._flow.called_once[path].begin)
        return [self._input(at, path) for at in range(len(self._batches))]

    def _go_to(self, time: float) -> None:
        skip = self._flow.skip(time)
        missing = [path for path in skip.needed if path not in self._outputs[0]]
        for at, outputs in enumerate(self._outputs):
            found = self._returned(at, missing, copied) if missing else {}
            self._outputs[at] = {path: outputs.get(path, found.get(path)) for path in skip.needed}
        self._skip = skip

    def _returned(self, at: int, paths: Sequence[str], form: Any) -> dict[str, Any]:
        """What modules return in a pass that ends once all have; ``form`` is applied to every tensor."""
        found: dict[str, Any] = {}

        def recorded(path: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            found[path] = tree_map_only(Tensor, form, output)
            if len(found) == len(paths):
                raise StopPass
            return output

        with suppress(StopPass):
            self._pass(at, {path: partial(recorded, path, self._net.get_submodule(path).forward) for path in paths})
        return found

    def _input(self, at: int, path: str) -> Tensor:
        found: list[Tensor] = []

        def stop(given: Tensor, *_: Any, **__: Any) -> None:
            found.append(given)
            raise StopPass

        with suppress(StopPass):
            self._pass(at, {path: stop})
        return found[0]

    @torch.no_grad()
    def _pass(self, at: int, forwards: Mapping[str, Forward]) -> None:
        answers = {path: _giving(self._outputs[at][path]) for path in self._skip.needed}
        shapes = self._shapes.get(len(self._batches[at]), {})
        for path in self._skip.unneeded:
            answers[path] = _giving(shapes[path], copy=self._flow.overwritten(self._flow.called_once[path]))
        with evaluation_mode(self._net), replaced_forwards(self._net, answers | dict(forwards)):
            self._net(self._batches[at])


def _giving(output: Any, *, copy: bool = True) -> Forward:
    """A function that returns ``output`` whatever it is given; a copy, where what follows may write into it."""
    return lambda *_, **__: tree_map_only(Tensor, copied, output) if copy else output
