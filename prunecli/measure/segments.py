"""Segments: a net that runs in pieces, each from one waist of its dataflow to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from prunecli.measure.dataflow import Call, Dataflow, Forward, replaced_forwards
from prunecli.measure.replay import handing_out, hollow, recording
from prunecli.models.outputs import logits_of


class Segments:
    """The pieces of a net. All run with its present weights, in its present mode, with gradients where they are on.

    What a piece runs besides its own modules is what the net's code does around modules before the piece, on tensors
    that hold nothing.

    Args:
        model: the net.
        flow: dataflow of the net, or of one with other widths or weights.
        ends: waists of ``flow`` at which pieces end, ascending; the last piece ends in the logits.
        image: one input of the net ``[1, C, H, W]``, for its size.
    """

    def __init__(self, model: nn.Module, flow: Dataflow, ends: Sequence[Call], image: Tensor) -> None:
        self._model, self._flow, self._ends, self._image = model, flow, tuple(ends), image
        self._hidden = tuple(flow.hidden_before(end) for end in ends)
        self._shapes: dict[int, dict[str, Any]] = {}  # by number of images, what modules return, as hollow tensors

    def __len__(self) -> int:
        return len(self._ends) + 1

    @property
    def widest(self) -> int:
        """Number of entries that one image has at the end of a piece, where that is largest; 0 for a single piece."""
        shapes = self._shapes_of(1)
        return max((tensor_in(shapes[end.path]).numel() for end in self._ends), default=0)

    def run(self, piece: int, x: Tensor) -> Tensor:
        """What a piece returns: the tensor at its end, or the logits ``[B, K]``.

        Args:
            piece: number of the piece.
            x: tensor that the piece before returned ``[B, ...]``; images ``[B, C, H, W]`` for the first.
        """
        images = x if piece == 0 else self._image.expand(len(x), *self._image.shape[1:])
        with replaced_forwards(self._model, self._answers(piece, x) if piece else {}):
            if piece == len(self._ends):
                return logits_of(self._model(images))
            path = self._ends[piece].path
            with recording(self._model, [path], stop=True) as returned:
                self._model(images)
        return tensor_in(returned[path])

    def _answers(self, piece: int, x: Tensor) -> dict[str, Forward]:
        """Functions that stand in for the modules before a piece: the last one hands out ``x``."""
        shapes = self._shapes_of(len(x))
        calls = self._flow.called_once
        answers = {
            path: handing_out(shapes[path], writable=self._flow.overwritten(calls[path]))
            for path in self._hidden[piece - 1]
        }
        start = self._ends[piece - 1]
        given = tree_map_only(Tensor, lambda _: x, shapes[start.path])
        return answers | {start.path: handing_out(given, writable=self._flow.overwritten(start))}

    @torch.no_grad()
    def _shapes_of(self, count: int) -> dict[str, Any]:
        if count not in self._shapes:
            paths = {path for hidden in self._hidden for path in hidden} | {end.path for end in self._ends}
            with recording(self._model, paths, form=hollow, stop=True) as self._shapes[count]:
                self._model(self._image.expand(count, *self._image.shape[1:]))
        return self._shapes[count]


def tensor_in(output: object) -> Tensor:
    """The one tensor among what a module returned."""
    (tensor,) = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return tensor
