"""What a model returns, read as logits: the one place that knows of outputs which are more than one tensor.

timm's classifiers return logits. Other models may return them inside a mapping (Hugging Face, torchvision's
segmentation style), a named tuple or dataclass (torchvision's Inception while training), or first in a tuple. Whoever
evaluates, trains or compares a model asks ``logits_of``; the model itself keeps returning what it returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from prunecli.errors import UnsupportedError

LOGIT_KEYS = ("logits", "out")


def logits_of(output: object) -> Tensor:
    """The logits ``[B, K]`` in what a model returned.

    A tensor is taken as it is. Of a mapping it is the entry ``logits`` or ``out``, of a named tuple or dataclass the
    field of that name, of any other tuple or list the first item.

    Raises:
        UnsupportedError: there is no such tensor, or it is not two-dimensional; names what was returned.
    """
    found = output
    while not isinstance(found, Tensor):
        parts = _parts(found)
        key = next((key for key in LOGIT_KEYS if key in parts), None)
        if key is None and isinstance(found, list | tuple) and found:
            found = found[0]
        elif key is not None:
            found = parts[key]
        else:
            raise UnsupportedError(
                f"The model returns {type(output).__name__} where logits [images, classes] are needed.",
                hint=f"Let it return a tensor, a mapping with {' or '.join(LOGIT_KEYS)}, or a tuple with them first.",
            )
    if found.dim() != 2:
        raise UnsupportedError(
            f"The model returns shape {tuple(found.shape)} where logits [images, classes] are needed."
        )
    return found


def tensors_of(output: object) -> list[Tensor]:
    """Every tensor in what a model returned, in order: inside mappings, lists, tuples and dataclasses."""
    if isinstance(output, Tensor):
        return [output]
    items = output if isinstance(output, list | tuple) else _parts(output).values()
    return [tensor for item in items for tensor in tensors_of(item)]


def as_rows(output: object, images: int) -> Tensor:
    """Everything that a model returned for a batch as one matrix ``[images, values]``.

    Args:
        output: tensor, or tensors inside mappings, lists, tuples and dataclasses, of any shapes. A tensor whose first
            dimension is not ``images`` counts for every image.
        images: number of images in the batch.
    """
    tensors = tensors_of(output)
    rows = [t.reshape(images, -1) if t.shape[:1] == (images,) else t.reshape(1, -1).expand(images, -1) for t in tensors]
    return torch.cat(rows, dim=1)


def _parts(value: object) -> Mapping[object, object]:
    """The named parts of a mapping, named tuple or dataclass; of anything else none."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        named: Mapping[object, object] = value._asdict()
        return named
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}
