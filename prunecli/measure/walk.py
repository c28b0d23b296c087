"""A walk through a net: passes over the same images that each go on from where the last one ended.

Layers ahead of the present point may be changed meanwhile. So a net can be worked on layer by layer, each layer seeing
what the finished ones before it give, at the price of about one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from prunecli.measure.activations import StopPass
from prunecli.measure.dataflow import Skip, replaced_forwards, trace
from prunecli.measure.replay import answers, copied, hollow_outputs, recording
from prunecli.models.layers import evaluation_mode


class Walk:
    """A net on its way through one forward pass over all images, batch by batch.

    Memory: what is read from the present point on, for all images: in most nets one or two activations.

    Args:
        net: the net; tensors that are used from the present point on may change, its architecture may not.
        batches: images ``[B, C, H, W]`` on the net's device.
    """

    @torch.no_grad()
    def __init__(self, net: nn.Module, batches: Sequence[Tensor]) -> None:
        self._net, self._batches = net, batches
        self._flow = trace(net, batches[0][:1])
        self._shapes = hollow_outputs(net, self._flow, batches)
        self._skip = Skip(needed=(), unneeded=())
        self._outputs: list[dict[str, Any]] = [{} for _ in batches]  # batch by batch, what is read from here on

    def inputs(self, path: str) -> Iterator[Tensor]:
        """What a module is given, batch by batch; the walk goes on to where the module begins.

        Args:
            path: path of a module that is called once, ahead of the present point.
        """
        skip = self._flow.skip(self._flow.called_once[path].begin)
        missing = [name for name in skip.needed if name not in self._outputs[0]]
        for at, outputs in enumerate(self._outputs):
            found: dict[str, Any] = {}
            if missing:
                with self._passing(at), recording(self._net, missing, form=copied, stop=True) as found:
                    self._net(self._batches[at])
            self._outputs[at] = {name: outputs.get(name, found.get(name)) for name in skip.needed}
        self._skip = skip
        return (self._input(at, path) for at in range(len(self._batches)))

    def _input(self, at: int, path: str) -> Tensor:
        found: list[Tensor] = []

        def stop(given: Tensor, *_: Any, **__: Any) -> None:
            found.append(given)
            raise StopPass

        with self._passing(at), suppress(StopPass), replaced_forwards(self._net, {path: stop}):
            self._net(self._batches[at])
        return found[0]

    @contextmanager
    def _passing(self, at: int) -> Iterator[None]:
        """While this is open, a pass of batch number ``at`` begins at the present point."""
        shapes = self._shapes[len(self._batches[at])]
        known = answers(self._flow, self._skip, self._outputs[at], shapes)
        with torch.no_grad(), evaluation_mode(self._net), replaced_forwards(self._net, known):
            yield
