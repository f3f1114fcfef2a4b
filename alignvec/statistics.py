"""Where a vector acts: size and share of change per layer, streamed tensor by tensor."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignvec.sources import open_source

if TYPE_CHECKING:
    from alignvec.vector import AlignmentVector

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?)\.(\d+)\.")
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
    """

    layer: int | str
    parameters: int
    changed: float
    norm: float
    relative_norm: float | None
    max_abs: float


def layer_of(name: str) -> int | str:
    """The layer that a parameter belongs to, by its name."""
    if match := LAYER.search(name):
        return int(match[1])
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "other")


def statistics(vector: AlignmentVector, base: Any = None) -> list[LayerStatistics]:
    """A row for every layer in the model's order; ``base`` (path or model) is needed for the relative norms only."""
    shapes = vector.tensors if vector.base is None else vector.base.tensors
    members: dict[int | str, list[str]] = {}
    for name in shapes:
        members.setdefault(layer_of(name), []).append(name)
    source = None if base is None else open_source(base)
    rows = []
    for layer, names in sorted(members.items(), key=lambda item: (isinstance(item[0], int), item[0])):
        changed, square, largest = 0, 0.0, 0.0
        for piece in (piece for name in names if name in vector for piece in vector.chunks(name)):
            changed += int(piece.count_nonzero())
            square += float(piece.double().square().sum())
            largest = max([largest, *(abs(float(end)) for end in piece.aminmax())])
        parameters = sum(math.prod(shapes[name].shape) for name in names)
        relative = None
        if source is not None:
            whole = sum(
                float(piece.double().square().sum())
                for name in names
                if name in source.tensors
                for piece in source.chunks(name)
            )
            relative = math.sqrt(square / whole) if whole else None
        rows.append(
            LayerStatistics(layer, parameters, changed / max(parameters, 1), math.sqrt(square), relative, largest)
        )
    return rows
