"""Operators over feature-map positions: pooling, resizing, pixel shuffle."""

from __future__ import annotations

import math

from prunecli.graph.axes.record import KERNEL, Call, Record
from prunecli.graph.axes.rules.registry import SPATIAL, rows, rule
from prunecli.graph.axes.terms import Atom, freeze, product


@rule("max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d")
@rule("adaptive_max_pool2d", "mkldnn_adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d")
@rule("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d")
@rule("reflection_pad2d", "replication_pad2d")
def _over_planes(record: Record, call: Call) -> None:
    _over_space(record, call, 2)


@rule("avg_pool1d", "adaptive_avg_pool1d", "max_pool1d", "upsample_nearest1d", "upsample_linear1d")
def _over_lines(record: Record, call: Call) -> None:
    _over_space(record, call, 1)


def _over_space(record: Record, call: Call, rank: int) -> None:
    value = record.value(call.args[0])
    record.freeze(value.dims[-rank:], SPATIAL)
    for out in call.outputs:
        spatial = [Atom(size, SPATIAL) for size in out.shape[-rank:]]
        record.put(out, [*value.dims[:-rank], *spatial], [*value.silent[:-rank], *[False] * rank])


@rule("pixel_shuffle")
def _pixel_shuffle(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    channels, inside = rows(record, value.dims[-3], out.shape[-3])
    freeze(inside, SPATIAL)
    record.freeze(value.dims[-2:], SPATIAL)
    spatial = [Atom(size, SPATIAL) for size in out.shape[-2:]]
    record.put(out, [*value.dims[:-3], channels, *spatial], [*value.silent[:-3], value.silent[-3], False, False])


@rule("pixel_unshuffle")
def _pixel_unshuffle(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    record.freeze(value.dims[-2:], SPATIAL)
    channels = product([value.dims[-3], Atom(call.args[1] ** 2, SPATIAL)])
    spatial = [Atom(size, SPATIAL) for size in out.shape[-2:]]
    record.put(out, [*value.dims[:-3], channels, *spatial], [*value.silent[:-3], value.silent[-3], False, False])


@rule("im2col")
def _im2col(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    record.freeze(value.dims[-2:], SPATIAL)
    channels = product([value.dims[-3], Atom(math.prod(call.args[1]), KERNEL)])
    silent = [*value.silent[:-3], value.silent[-3], False]
    record.put(out, [*value.dims[:-3], channels, Atom(out.shape[-1], SPATIAL)], silent)


@rule("col2im")
def _col2im(record: Record, call: Call) -> None:
    value, out = record.value(call.args[0]), call.out
    record.freeze(value.dims[-1:], SPATIAL)
    channels, inside = rows(record, value.dims[-2], out.shape[-3])
    freeze(inside, KERNEL)
    spatial = [Atom(size, SPATIAL) for size in out.shape[-2:]]
    record.put(out, [*value.dims[:-2], channels, *spatial], [*value.silent[:-2], value.silent[-2], False, False])


@rule("unfold")
def _unfold(record: Record, call: Call) -> None:
    """Overlapping windows along one dimension: their number takes its place, their length comes last."""
    value, out = record.value(call.args[0]), call.out
    at = call.args[1] % len(value.dims)
    freeze(value.dims[at], SPATIAL)
    windows, length = Atom(out.shape[at], SPATIAL), Atom(out.shape[-1], SPATIAL)
    dims = [*value.dims[:at], windows, *value.dims[at + 1 :], length]
    record.put(out, dims, [*value.silent[:at], False, *value.silent[at + 1 :], False])
