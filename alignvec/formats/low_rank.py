"""low-rank: delta = B A with A [rank, cols] and B [rows, rank]. rank * (rows + cols) numbers instead of rows * cols.

`encode` truncates the singular value decomposition, exact for small matrices and for large ones by oversampled
subspace iteration (Halko et al., arXiv 0909.4061); each factor takes the square root of the singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.formats.spec import Encoded, Option, Spec, matrix, span

OPTIONS: dict[str, Option] = {"rank": 16, "dtype": "bfloat16"}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
EXACT = 512  # the smaller side up to which a full decomposition costs little
ITERATIONS = 6


def validate(spec: Spec) -> None:
    if int(spec.options["rank"]) < 1:
        raise AlignvecError(f"format low-rank: rank={spec.options['rank']} must be at least 1")
    if spec.options["dtype"] not in DTYPES:
        raise AlignvecError(f"format low-rank: dtype={spec.options['dtype']} must be bfloat16 or float32")


def encode(spec: Spec, delta: Tensor, base: Tensor | None, aligned: Tensor | None, name: str) -> Encoded:
    (rows, cols), shape = matrix(tuple(delta.shape)), tuple(delta.shape)
    rank, dtype = min(int(spec.options["rank"]), rows, cols), str(spec.options["dtype"])
    x = delta.reshape(rows, cols).to(torch.float32, copy=True)
    largest = torch.maximum(x.amax(), -x.amin())
    x /= torch.where(largest == 0, 1, largest)
    u, s, vh = _leading(x, 2 * rank + 16)
    root = (s[:rank] * largest).sqrt()
    parts = {
        "A": (root[:, None] * vh[:rank]).to(DTYPES[dtype]).contiguous(),
        "B": (u[:, :rank] * root).to(DTYPES[dtype]).contiguous(),
    }
    return Encoded("low-rank", shape, {"rank": rank, "dtype": dtype}, parts)


def _leading(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """u, s, v^T of x [rows, cols] for at least `count` singular values, of which the first half are accurate."""
    if min(x.shape) <= max(EXACT, count):
        return torch.linalg.svd(x, full_matrices=False)
    start = torch.randn(x.shape[1], count, generator=torch.Generator().manual_seed(0)).to(x.device)
    q = torch.linalg.qr(x @ start).Q
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(x @ torch.linalg.qr(x.mT @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.mT @ x, full_matrices=False)
    return q @ u, s, vh


def decode(encoded: Encoded, base: Tensor | None, rows: slice | None) -> Tensor:
    """B A, float32 [n, cols]."""
    start, stop = span(rows, matrix(encoded.shape)[0])
    return encoded.parts["B"][start:stop].float() @ encoded.parts["A"].float()


def bound(encoded: Encoded) -> float:
    """No decoded value, and no partial sum of one, is further from 0."""
    a, b = encoded.parts["A"], encoded.parts["B"]
    largest = [max(abs(float(end)) for end in part.aminmax()) if part.numel() else 0.0 for part in (a, b)]
    coarse = a.shape[0] * largest[0] * largest[1]
    if coarse <= torch.finfo(torch.float32).max / 2:
        return coarse
    return float(b.double().norm(dim=1).amax() * a.double().norm(dim=0).amax())


def layout(spec: Spec, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
    (rows, cols), rank, dtype = matrix(shape), int(spec.options["rank"]), DTYPES[str(spec.options["dtype"])]
    return {"A": (dtype, (rank, cols)), "B": (dtype, (rows, rank))}
