"""Where a vector acts: size and share of change per layer, streamed tensor by tensor."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from alignvec.numbers import float64_sum
from alignvec.sources import open_source

if TYPE_CHECKING:
    from alignvec.vector import AlignmentVector

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?)\.(\d{1,9})\.")
KINDS = (
    ("head", re.compile(r"lm_head|embed_out")),
    ("embedding", re.compile(r"embed|wte|wpe")),
    ("norm", re.compile(r"norm|ln_")),
)


@dataclass(frozen=True)
class LayerStatistics:
    """One layer of a vector. ``layer``: its index, or ``"embedding"``, ``"norm"``, ``"head"``, ``"other"``.

    ``parameters``: values in the layer's floating tensors, untouched ones included when the base is known.
    ``changed``: the share of them that the vector moves. ``norm``: Euclidean norm of the deltas. ``relative_norm``:
    that over the norm of the base's values, None without the base. ``max_abs``: the largest change of a value.
    ``formats``: how the deltas are stored, in ``nbytes`` bytes where dense ones in the base's dtype would take
    ``dense_bytes``. ``error``: norm of what encoding lost over the norm of the deltas; None where nobody measured it.

    Of lossless deltas without their base ``changed`` and ``max_abs`` are None; the norm is the one that was recorded.
    """

    layer: int | str
    parameters: int
    changed: float | None
    norm: float | None
    relative_norm: float | None
    max_abs: float | None
    formats: tuple[str, ...]
    nbytes: int
    dense_bytes: int
    error: float | None


def layer_of(name: str) -> int | str:
    """The layer that a parameter belongs to, by its name."""
    if match := LAYER.search(name):
        return int(match[1])
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "other")


def total_error(vector: AlignmentVector) -> float | None:
    """Norm of what encoding lost over the norm of the deltas, from what was recorded; None where that is incomplete."""
    errors = [vector.errors.get(name) for name in vector]
    if all(error is not None and not error.relative for error in errors):
        return 0.0
    lost = before = 0.0
    for error in errors:
        if error is None or error.norm is None:
            return None
        lost += (error.relative * error.norm) ** 2
        before += error.norm**2
    return math.sqrt(lost / before) if before else 0.0


def dense_bytes(vector: AlignmentVector, name: str) -> int:
    """What the delta would take stored dense in its base's dtype (in its own, where the base is not known)."""
    info = vector.tensors[name]
    dtype = info.dtype if vector.base is None else getattr(torch, vector.base.tensors[name].dtype)
    return info.numel * dtype.itemsize


def statistics(vector: AlignmentVector, base: Any = None) -> list[LayerStatistics]:
    """A row for every layer in the model's order; ``base`` (path or model) is needed for the relative norms, and to
    read lossless deltas."""
    if base is not None and vector.needs_base:
        vector = vector.with_base(base)
    shapes = vector.tensors if vector.base is None else vector.base.tensors
    members: dict[int | str, list[str]] = {}
    for name in shapes:
        members.setdefault(layer_of(name), []).append(name)
    source = None if base is None else open_source(base)
    rows = []
    for layer, names in sorted(members.items(), key=lambda item: (isinstance(item[0], int), item[0])):
        own = [name for name in names if name in vector]
        measured = [_measure(vector, name) for name in own]
        readable = all(each.changed is not None for each in measured)
        known = all(each.square is not None for each in measured)
        square = float64_sum(sum(each.square or 0.0 for each in measured), f"the norm of layer {layer}")
        errors = [vector.errors.get(name) for name in own]
        lost = sum(
            error.relative**2 * (each.square or 0.0 if error.norm is None else error.norm**2)
            for error, each in zip(errors, measured, strict=True)
            if error is not None
        )
        before = sum(
            each.square or 0.0 if error is None or error.norm is None else error.norm**2
            for error, each in zip(errors, measured, strict=True)
        )
        parameters = sum(math.prod(shapes[name].shape) for name in names)
        relative = None
        if source is not None:
            whole = sum(
                float(piece.double().square().sum())
                for name in names
                if name in source.tensors
                for piece in source.chunks(name)
            )
            relative = math.sqrt(square / whole) if whole and known else None
        rows.append(
            LayerStatistics(
                layer,
                parameters,
                sum(each.changed or 0 for each in measured) / max(parameters, 1) if readable else None,
                math.sqrt(square) if known else None,
                relative,
                max((each.largest or 0.0 for each in measured), default=0.0) if readable else None,
                tuple(dict.fromkeys(str(vector.format_of(name)) for name in own)),
                sum(vector.stored_bytes(name) for name in own),
                sum(dense_bytes(vector, name) for name in own),
                None if None in errors else math.sqrt(lost / before) if before else 0.0,
            )
        )
    return rows


@dataclass(frozen=True)
class _Measured:
    changed: int | None
    square: float | None
    largest: float | None


def _measure(vector: AlignmentVector, name: str) -> _Measured:
    if vector.format_of(name).name == "lossless" and vector.needs_base:
        error = vector.errors.get(name)
        return _Measured(None, None if error is None or error.norm is None else error.norm**2, None)
    changed, square, largest = 0, 0.0, 0.0
    for piece in vector.chunks(name):
        changed += int(piece.count_nonzero())
        square += float(piece.double().square().sum())
        largest = max([largest, *(abs(float(end)) for end in piece.aminmax())])
    float64_sum(square, f"the norm of delta {name}")
    return _Measured(changed, square, largest)
