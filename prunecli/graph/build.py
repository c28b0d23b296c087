"""Module → dependency graph: which axes of which tensors must shrink together. Axis inference is the engine; a second
one, `torch_pruning_engine`, is kept as a reference to check it against.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from prunecli.errors import UsageError, nearest
from prunecli.values.groups import Graph

ENGINES = ("axes", "torch_pruning")


def build_graph(model: nn.Module, input_size: tuple[int, int, int], *, engine: str = "axes") -> Graph:
    """The dependency graph of a model.

    Args:
        model: the model, on the CPU or the meta device, in any dtype; it is left exactly as it was.
        input_size: channels, height, width of one image.
        engine: ``axes`` (axis inference) or ``torch_pruning`` (the reference engine).

    Raises:
        UnsupportedError: the forward cannot be followed; names the place.
        UsageError: there is no such engine.
    """
    if engine == "axes":
        from prunecli.graph.axes.rehearsal import rehearse
        from prunecli.graph.axes.trace import trace

        with _no_collection():
            return rehearse(trace(model, input_size), input_size)
    if engine == "torch_pruning":
        from prunecli.graph.torch_pruning_engine import build

        return build(model, input_size)
    raise UsageError(f"There is no graph engine {engine!r}.", hint=nearest(engine, ENGINES))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from running.

    A graph is built of many small objects, all of which stay until the end: to look for garbage among them, and among
    all that torch and timm hold, takes longer than the work itself.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
