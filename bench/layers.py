"""Linear layers of a model under vectors of any format, random contents, and the check that what is timed is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignvec import planner
from alignvec.errors import AlignvecError
from alignvec.kernels import operands, reference
from alignvec.kernels.eager import take
from alignvec.kernels.operands import Operand
from alignvec.timing import random_operand


@dataclass(frozen=True)
class Shape:
    """A launch of a decoder layer: the projections that read the same x."""

    name: str
    outs: tuple[int, ...]
    inputs: int

    @property
    def out(self) -> int:
        return sum(self.outs)

    def scaled(self, by: int) -> Shape:
        """Both sides `by` times smaller, no side under 32."""
        return Shape(self.name, tuple(max(32, out // by) for out in self.outs), max(32, self.inputs // by))


MISTRAL = (
    Shape("qkv", (4096, 1024, 1024), 4096),
    Shape("o", (4096,), 4096),
    Shape("gate_up", (14336, 14336), 4096),
    Shape("down", (4096,), 14336),
)
# Mistral-7B on a GPU; on a CPU one of its decoder layers, with both sides halved.
SHAPES = {"cuda": MISTRAL, "cpu": tuple(shape.scaled(2) for shape in MISTRAL)}
LAYERS = {"cuda": 32, "cpu": 1}


@dataclass(frozen=True)
class Weights:
    """One copy of a shape's base: the matrix, and its projections as views of it."""

    matrix: Tensor
    projections: tuple[Tensor, ...]


class Contents:
    """Random weights and vectors, drawn once, which takes longer than most of what is timed, and copied."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._weights: dict[tuple[Shape, torch.dtype], Tensor] = {}
        self._vectors: dict[tuple[Shape, torch.dtype, str, int], list[Operand]] = {}

    def weights(self, shape: Shape, dtype: torch.dtype, count: int) -> list[Weights]:
        """A base of standard deviation 0.02, `count` times."""
        matrix = self._weights.get((shape, dtype))
        if matrix is None:
            generator = torch.Generator(self.device).manual_seed(0)
            drawn = torch.randn(shape.out, shape.inputs, generator=generator, device=self.device)
            matrix = self._weights[shape, dtype] = (0.02 * drawn).to(dtype)
        matrices = [matrix, *(matrix.clone() for _ in range(count - 1))]
        return [Weights(each, each.split(shape.outs)) for each in matrices]

    def vectors(
        self, formats: Sequence[str], shape: Shape, dtype: torch.dtype, count: int
    ) -> list[list[list[Operand]]]:
        """The operands of each projection, a vector for each of `formats`, as kernels read them, `count` times."""
        vectors = [self._vector(text, number, shape, dtype) for number, text in enumerate(formats)]
        drawn = [[vector[projection] for vector in vectors] for projection in range(len(shape.outs))]
        return [drawn, *([[_copied(operand) for operand in own] for own in drawn] for _ in range(count - 1))]

    def _vector(self, text: str, number: int, shape: Shape, dtype: torch.dtype) -> list[Operand]:
        key = shape, dtype, text, number
        if key not in self._vectors:
            generator = torch.Generator(self.device).manual_seed(1 + number)
            projections = self.weights(shape, dtype, 1)[0].projections
            self._vectors[key] = [random_operand(text, weight, generator) for weight in projections]
        return self._vectors[key]


def _copied(operand: Operand) -> Operand:
    return replace(operand, parts=tuple(part.clone() for part in operand.parts))


@dataclass(frozen=True)
class Coefficients:
    """columns int32 [k], table float32 [rows, k], rows int32 [1]: no coefficient is 0, and no two mixes are alike."""

    columns: Tensor
    table: Tensor
    rows: Tensor


def draw_coefficients(vectors: Sequence[Operand], weight: Tensor, rows: int) -> Coefficients:
    """Coefficients with which each vector weighs about a third of the base, so that an error in one shows."""
    device, k = weight.device, len(vectors)
    generator = torch.Generator(device).manual_seed(1)
    table = torch.rand(rows, k, generator=generator, device=device) + 0.5
    some = sample(weight.shape[0], device)
    base = weight[some]
    for i, vector in enumerate(vectors):
        table[:, i] *= 0.3 * base.float().norm() / operands.decode(take(vector, some), base).norm()
    table *= 1 - 2 * (torch.arange(k, device=device) % 2)
    counts = torch.tensor([rows], dtype=torch.int32, device=device)
    return Coefficients(torch.arange(k, dtype=torch.int32, device=device), table, counts)


def sample(out_features: int, device: torch.device, count: int = 48) -> Tensor:
    """Output rows from the first to the last."""
    return torch.linspace(0, out_features - 1, min(count, out_features), device=device).round().long()


def run(
    x: Tensor,
    projections: Sequence[Tensor],
    vectors: Sequence[Sequence[Operand]],
    c: Coefficients,
    execution: str = "auto",
    precision: str = "exact",
    backend: str = "auto",
) -> list[Tensor]:
    """alignvec's operator: all projections of x [tokens, in], in one launch where kernels can."""
    chosen = planner.resolve_backend(x.device.type, backend)
    module = planner.linear_module(chosen)
    members = [(weight, None, own, None, c.columns) for weight, own in zip(projections, vectors, strict=True)]
    if chosen in planner.GROUPED:
        from alignvec.kernels.packing import Projection

        group = [Projection(*member) for member in members]
        results: list[Tensor] = module.linear_group(x, group, c.table, c.rows, execution=execution, precision=precision)
        return results
    return [module.linear(x, *member, c.table, c.rows, execution=execution, precision=precision) for member in members]


def vector_bytes(vectors: Sequence[Sequence[Operand]]) -> int:
    """Bytes of all operands as they are stored."""
    return sum(operand.nbytes for own in vectors for operand in own)


def check(
    results: Sequence[Tensor],
    x: Tensor,
    projections: Sequence[Tensor],
    vectors: Sequence[Sequence[Operand]],
    c: Coefficients,
    what: str,
    merged: bool = False,
    slack: float = 2e-4,
) -> float:
    """The largest relative error of the results [tokens, out] against the float64 reference, over sampled outputs.

    merged: the mix of row 0, rounded to the weight's dtype, is what the reference multiplies with; low-rank vectors
    stay out of it and exact.

    Raises:
        AlignvecError: an error is more than the rounding of the result, and `slack`, explain.
    """
    worst = 0.0
    for y, weight, own in zip(results, projections, vectors, strict=True):
        some = sample(weight.shape[0], weight.device)
        base, taken = weight[some], [take(operand, some) for operand in own]
        if merged:
            edits = [float(f) * operands.decode(o, base).double() for f, o in zip(c.table[0], taken, strict=True)]
            zero, low_rank = base.new_zeros(base.shape, dtype=torch.float64), [o.kind == "low-rank" for o in taken]
            mix = base.double() + sum((e for e, own in zip(edits, low_rank, strict=True) if not own), zero)
            exact = sum((e for e, own in zip(edits, low_rank, strict=True) if own), zero)
            truth = x.double() @ (mix.to(weight.dtype).double() + exact).t()
        else:
            truth = reference.linear(x, base, None, taken, None, c.columns, c.table, c.rows)
        error = _relative(y[:, some].double(), truth)
        bound = 1.1 * _relative(truth.to(y.dtype).double(), truth) + slack
        if not error <= bound:
            raise AlignvecError(f"{what} is wrong: its relative error is {error:.1e}, rounding explains {bound:.1e}")
        worst = max(worst, error)
    return worst


def _relative(y: Tensor, truth: Tensor) -> float:
    return float((y - truth).norm() / truth.norm())
