"""One small pass through every kernel, odd sizes in all dimensions: what `make sanitize` looks on at.

compute-sanitizer finds reads and writes out of bounds, and races in shared memory, in what is launched here.
"""

from __future__ import annotations

import pytest
import torch

from alignvec.kernels import embedding, linear, materialise, norm
from alignvec.kernels.linear import Projection
from tests.kernels.cases import DEVICE, FORMATS, Case


@pytest.mark.parametrize("format", [*FORMATS, "mixed"])
def test_linear(format: str) -> None:
    for tokens in (3, 70) if DEVICE == "cuda" else (3,):
        args = Case(tokens, 37, 131, 3, rows="random", bias=True, format=format).make()
        for execution in ("split", "combine"):
            assert linear.linear(*args, execution=execution).isfinite().all()


def test_projections_of_one_launch() -> None:
    x, *one, table, rows, _ = Case(5, 37, 131, 3, bias=True, format="mixed").make()
    other = Case(5, 21, 131, 3, bias=True).make(1)[1:6]
    results = linear.linear_group(x, [Projection(*one), Projection(*other)], table, rows)
    assert [tuple(y.shape) for y in results] == [(5, 37), (5, 21)]
    assert all(y.isfinite().all() for y in results)


@pytest.mark.parametrize("format", [*FORMATS, "mixed"])
def test_embedding_and_materialise(format: str) -> None:
    _, weight, _, vectors, _, columns, table, rows, _ = Case(1, 37, 131, 3, format=format).make()
    ids = torch.tensor([0, 36, 17], device=DEVICE)
    assert embedding.embedding(ids, weight, vectors, columns, table, rows).isfinite().all()
    out, low = torch.empty_like(weight), torch.empty_like(weight)
    materialise.materialise(weight, vectors, columns, table, rows, out=out, low=low)
    assert out.isfinite().all()
    assert low.isfinite().all()


def test_norms() -> None:
    columns, table, rows = Case(3, 40, 130, 3).make()[5:8]
    x, weight, deltas = (torch.randn(*shape, 131, device=DEVICE) for shape in ((3,), (), (3,)))
    assert norm.rms_norm(x, weight, deltas, columns, table, rows, eps=1e-6).isfinite().all()
    y = norm.layer_norm(x, weight, weight, deltas, deltas, columns, table, rows, eps=1e-6)
    assert y.isfinite().all()
