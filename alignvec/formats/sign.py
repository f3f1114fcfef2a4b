"""sign: one bit a weight and a scale for each row, or each group of a row; delta = +scale or -scale.

1/8 byte a weight. The scale is the mean of |delta|, which minimises the squared error; as BitDelta (arXiv 2402.10193)
has it, with a scale a row where that has one a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from alignvec.errors import AlignvecError
from alignvec.formats import bits
from alignvec.formats.integer import scale_groups
from alignvec.formats.spec import Encoded, Option, Spec, blocks, matrix, span

OPTIONS: dict[str, Option] = {"group": 0}  # 0: a row is one group
LARGEST_GROUP = 1 << 30


def validate(spec: Spec) -> None:
    group = spec.options["group"]
    if not isinstance(group, int) or not 0 <= group <= LARGEST_GROUP or group % 32:
        raise AlignvecError(
            f"format sign: group={group} must be a multiple of 32 up to {LARGEST_GROUP}, or 0 for one scale a row"
        )


def encode(spec: Spec, delta: Tensor, base: Tensor | None, aligned: Tensor | None, name: str) -> Encoded:
    (rows, cols), shape = matrix(tuple(delta.shape)), tuple(delta.shape)
    parts = {
        key: torch.empty(size, dtype=dtype, device=delta.device) for key, (dtype, size) in layout(spec, shape).items()
    }
    delta, groups = delta.reshape(rows, cols), parts["scales"].shape[1]
    group = min(int(spec.options["group"]) or cols, cols)
    sizes = torch.full((groups,), group, device=delta.device)
    sizes[-1] = cols - (groups - 1) * group
    largest = torch.finfo(parts["scales"].dtype).max
    for block in blocks(rows, cols):
        x = delta[block].float()
        parts["signs"][block] = bits.pack((x < 0).view(torch.uint8), 1)
        magnitudes = F.pad(x.abs(), (0, groups * group - cols)).view(len(x), groups, group)
        # Divided before it is summed: a sum could leave float32's range.
        means = (magnitudes / sizes[:, None]).sum(-1) if magnitudes.amax() > 1e30 else magnitudes.sum(-1) / sizes
        parts["scales"][block] = means.clamp_max_(largest)
    return Encoded(spec.name, shape, dict(spec.options), parts)


def decode(encoded: Encoded, base: Tensor | None, rows: slice | None) -> Tensor:
    """(1 - 2 bit) * scale, float32 [n, cols]."""
    count, cols = matrix(encoded.shape)
    start, stop = span(rows, count)
    signs, scales = encoded.parts["signs"][start:stop], encoded.parts["scales"][start:stop]
    out = torch.empty(stop - start, cols, dtype=torch.float32, device=signs.device)
    for block in blocks(stop - start, cols):
        out[block] = bits.unpack(signs[block], 1, cols)
        out[block].mul_(-2).add_(1)
        scale_groups(out[block], scales[block].float(), int(encoded.options["group"]) or cols)
    return out


def layout(spec: Spec, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
    (rows, cols), group = matrix(shape), int(spec.options["group"])
    scales = (torch.bfloat16, (rows, -(-cols // group))) if group else (torch.float32, (rows, 1))
    return {"signs": (torch.uint8, (rows, bits.row_bytes(cols, 1))), "scales": scales}
