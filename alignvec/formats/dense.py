"""dense: the delta as it is, in its own dtype. 2 bytes a weight in bf16 and fp16, 4 in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from alignvec.formats.spec import Encoded, Option, Spec, matrix, span

OPTIONS: dict[str, Option] = {}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def encode(spec: Spec, delta: Tensor, base: Tensor | None, aligned: Tensor | None, name: str) -> Encoded:
    return Encoded("dense", tuple(delta.shape), {}, {"": delta})


def decode(encoded: Encoded, base: Tensor | None, rows: slice | None) -> Tensor:
    """Its rows, `[n, cols]`, in the dtype it is stored in; a view of the part."""
    count, cols = matrix(encoded.shape)
    start, stop = span(rows, count)
    return encoded.parts[""].reshape(count, cols)[start:stop]


def layout(spec: Spec, shape: tuple[int, ...]) -> dict[str, tuple[tuple[torch.dtype, ...], tuple[int | None, ...]]]:
    return {"": (DTYPES, shape)}
