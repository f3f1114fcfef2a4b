"""Realised against requested coefficients: what a stored merge makes of them, and what alignvec does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from alignvec.deltas import as_dense
from alignvec.errors import AlignvecError
from alignvec.extract import parse_dtype
from alignvec.numbers import float32_number
from alignvec.pictures import write_picture
from alignvec.rounding import RealisedCoefficients, mix_
from alignvec.sources import Source, open_source
from alignvec.stored_base import bind, require_base
from alignvec.vector import AlignmentVector

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID = tuple(step / 10 for step in range(-13, 14))
PROBES = 64  # inputs of a layer that are probed
BLOCK = 1 << 18  # values of a layer that are read


@dataclass(frozen=True)
class Realised:
    """One requested coefficient of one vector, and what came of it: the projection of the realised edit on the vector.

    ``naive``: weights stored as ``round(W + c D)``. ``alignvec``: measured on the operator's own output.
    """

    vector: str
    requested: float
    naive: float
    alignvec: float


def check(
    base: str | Path | nn.Module,
    vectors: Mapping[str, AlignmentVector | str | Path],
    coefficients: Sequence[float] = GRID,
    dtype: str | torch.dtype = torch.bfloat16,
    *,
    transfer: bool = False,
) -> list[Realised]:
    """A row for every vector and coefficient, for a model whose weights are held in ``dtype``.

    Of every tensor that the vector edits a block is taken: 64 inputs of up to 2**18 weights' worth of output rows. The
    operator itself is applied to unit inputs there, one batch row a coefficient, and its output minus the base's
    projected on the delta. Raises AlignvecError for a different base (``transfer`` allows other values).
    """
    held = parse_dtype(dtype)
    coefficients = [
        float32_number(coefficient, "coefficient", number) for number, coefficient in enumerate(coefficients)
    ]
    source = open_source(base)
    rows = []
    for label, given in vectors.items():
        vector = given if isinstance(given, AlignmentVector) else AlignmentVector.load(given)
        require_base(source, label, vector, values=not transfer)
        vector = bind(source, label, vector, transfer=transfer)
        naive = [RealisedCoefficients(1) for _ in coefficients]
        exact = [RealisedCoefficients(1) for _ in coefficients]
        for name in vector:
            weight, delta = _block(source, vector, name, held)
            try:
                edited = _operator(weight, delta, coefficients)
            except AlignvecError as error:
                raise AlignvecError(f"{name}: {error}") from None
            for i, coefficient in enumerate(coefficients):
                merged = mix_(torch.empty_like(weight), weight, [delta], [coefficient])
                naive[i].update(weight, merged, {0: delta})
                exact[i].update(weight, edited[i], {0: delta})
        for i, coefficient in enumerate(coefficients):
            rows.append(Realised(label, coefficient, naive[i].solve()[0], exact[i].solve()[0]))
    return rows


def _block(source: Source, vector: AlignmentVector, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A block of a weight and of its delta: [out, probes], or [values] of a tensor with one dimension."""
    shape = source.tensors[name].shape
    inputs = shape[-1] if len(shape) > 1 else 1
    outputs = source.tensors[name].numel // max(inputs, 1)
    count = min(outputs, max(1, BLOCK // max(inputs, 1)))
    start = (outputs - count) // 2 * inputs
    weight = source.read(name, start, start + count * inputs).to(dtype)
    delta = vector.read(name, start, start + count * inputs)
    if len(shape) < 2:
        return weight, delta
    columns = torch.linspace(0, inputs - 1, min(PROBES, inputs)).long()
    return weight.view(count, inputs)[:, columns].contiguous(), delta.view(count, inputs)[:, columns].contiguous()


def _operator(weight: Tensor, delta: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The weights that the operator acts with, [coefficients, *weight.shape], read off its output: float32, or float64
    of a float64 weight."""
    from alignvec.kernels import eager, operands
    from alignvec.prepack import dense

    count = len(coefficients)
    table = torch.tensor(coefficients, dtype=torch.float32)[:, None]
    columns, rows = torch.zeros(1, dtype=torch.int32), torch.tensor([count], dtype=torch.int32)
    values = dense(as_dense(delta), weight, weight.device)  # as attached: kernels take no float64
    deltas = [operands.dense(values.view(-1, delta.shape[-1]))]
    if weight.dim() < 2:
        return eager.mix(weight, deltas, columns, table, rows, count)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    unit = torch.eye(weight.shape[1], dtype=wide).repeat(count, 1)
    output = eager.linear(unit, weight, None, deltas, None, columns, table, rows)
    return output.view(count, weight.shape[1], weight.shape[0]).transpose(1, 2)


def plot(rows: Sequence[Realised], output: str | Path) -> Figure:
    """Draw realised against requested coefficients, a panel a vector, into a picture file; needs matplotlib."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(row.vector for row in rows))
    figure = Figure(figsize=(4.2 * len(labels), 4), layout="constrained")
    for axes, label in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels, strict=True):
        own = [row for row in rows if row.vector == label]
        requested = [row.requested for row in own]
        axes.plot(requested, requested, color="0.8", linewidth=4, label="requested")
        axes.plot(requested, [row.naive for row in own], ".-", color="tab:red", label="merge stored in 16 bits")
        axes.plot(requested, [row.alignvec for row in own], ".-", color="tab:blue", label="alignvec")
        axes.set(title=label, xlabel="requested coefficient", ylabel="realised coefficient")
        axes.legend(frameon=False)
    write_picture(figure, output)
    return figure
