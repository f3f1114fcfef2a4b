"""int8 and int4: symmetric integers with one bf16 scale a group of columns; delta = code * scale.

1 byte and 1/2 byte a weight, and 2 / group for the scale. The scale of a group minimises the squared error, found by
alternating least squares (codes from the scale, then the scale from the codes) from a few beginnings.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from alignvec.errors import AlignvecError
from alignvec.formats import bits
from alignvec.formats.spec import Encoded, Option, Spec, blocks, matrix, span

OPTIONS: dict[str, Option] = {"group": 128}
GROUPS = (32, 64, 128)
LIMITS = {"int8": 127, "int4": 7}  # codes are -limit to limit
STARTS = {"int8": (127,), "int4": (7, 8, 9)}  # the largest magnitude over these is where the search begins
ROUNDS = 3


def validate(spec: Spec) -> None:
    if spec.options["group"] not in GROUPS:
        raise AlignvecError(f"format {spec.name}: group must be one of {', '.join(map(str, GROUPS))}")


def encode(spec: Spec, delta: Tensor, base: Tensor | None, aligned: Tensor | None, name: str) -> Encoded:
    (rows, cols), shape = matrix(tuple(delta.shape)), tuple(delta.shape)
    parts = {
        key: torch.empty(size, dtype=dtype, device=delta.device) for key, (dtype, size) in layout(spec, shape).items()
    }
    delta = delta.reshape(rows, cols)
    for block in blocks(rows, cols):
        parts["scales"][block], codes = quantise(delta[block].float(), int(spec.options["group"]), spec.name)
        parts["codes"][block] = codes if spec.name == "int8" else bits.pack((codes + 8).view(torch.uint8), 4)
    return Encoded(spec.name, shape, dict(spec.options), parts)


def quantise(x: Tensor, group: int, name: str) -> tuple[Tensor, Tensor]:
    """float32 [rows, cols] -> scales bf16 [rows, groups] and codes int8 [rows, cols]."""
    rows, cols = x.shape
    limit = LIMITS[name]
    x = F.pad(x, (0, -cols % group)).view(rows, -1, group)
    largest = x.abs().amax(-1, keepdim=True)
    y = x / torch.where(largest == 0, 1, largest)  # in [-1, 1], so that no square leaves float32's range
    scale, best = torch.zeros_like(largest), torch.zeros_like(largest)
    for start in STARTS[name]:
        tried = torch.full_like(largest, 1 / start)
        for _ in range(ROUNDS):
            q = (y / tried).round_().clamp_(-limit, limit)
            product, square = (y * q).sum(-1, keepdim=True), q.square_().sum(-1, keepdim=True).clamp_min_(1)
            tried, gain = product / square, product.square() / square  # the error is |y|^2 - gain
            scale, best = torch.where(gain > best, tried, scale), torch.maximum(gain, best)
    scales = (scale * largest).to(torch.bfloat16)
    codes = (x / scales.float()).nan_to_num_(0, 0, 0).round_().clamp_(-limit, limit).to(torch.int8)
    return scales.squeeze(-1), codes.view(rows, -1)[:, :cols]


def decode(encoded: Encoded, base: Tensor | None, rows: slice | None) -> Tensor:
    """code * scale, float32 [n, cols]."""
    count, cols = matrix(encoded.shape)
    start, stop = span(rows, count)
    group = int(encoded.options["group"])
    codes, scales = encoded.parts["codes"][start:stop], encoded.parts["scales"][start:stop]
    out = torch.empty(stop - start, cols, dtype=torch.float32, device=codes.device)
    for block in blocks(stop - start, cols):
        values = codes[block] if encoded.name == "int8" else bits.unpack(codes[block], 4, cols).view(torch.int8) - 8
        out[block] = values
        scale_groups(out[block], scales[block].float(), group)
    return out


def bound(encoded: Encoded) -> float:
    """No decoded value is further from 0. Files may hold the lowest code, which no encoder writes."""
    scales = encoded.parts["scales"]
    return max(abs(float(end)) for end in scales.aminmax()) * (LIMITS[encoded.name] + 1) if scales.numel() else 0.0


def scale_groups(values: Tensor, scales: Tensor, group: int) -> None:
    """Multiply `values` [rows, cols] in place by `scales` [rows, ceil(cols / group)], one a group of columns."""
    cols = values.shape[1]
    whole = cols - cols % group
    if whole:
        values[:, :whole].unflatten(1, (-1, group)).mul_(scales[:, : whole // group, None])
    if whole < cols:
        values[:, whole:].mul_(scales[:, -1:])


def layout(spec: Spec, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
    (rows, cols), group = matrix(shape), int(spec.options["group"])
    codes = (torch.int8, (rows, cols)) if spec.name == "int8" else (torch.uint8, (rows, bits.row_bytes(cols, 4)))
    return {"codes": codes, "scales": (torch.bfloat16, (rows, -(-cols // group)))}
