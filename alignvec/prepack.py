"""From a delta as files hold it to the operand that kernels read, on the weight's device.

Packed once, when vectors are attached. Four things become dense, which kernels read anywhere:
- lossless steps for a weight that has another dtype than the checkpoints of the vector: there are no bits to step on;
- sparse deltas with more than 65535 inputs a row, whose offsets are 16 bits;
- coded, lossless and sparse deltas of a transposed layer (GPT-2's Conv1D stores [in, out]): codes would run along the
  outputs;
- deltas without a matrix: parameters of one dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from alignvec.errors import AlignvecError
from alignvec.formats import Encoded, bits, decode, lossless
from alignvec.formats.lossless import DTYPES
from alignvec.formats.spec import blocks, finite
from alignvec.kernels import operands
from alignvec.kernels.operands import Operand

BITS = {"int8": 8, "int4": 4, "sign": 1}
MOST_SPARSE_INPUTS = 65535
STEP_BITS = (2, 4, 8)  # of a lossless field, as kernels read it
ASIDE_BYTES = 12  # of an entry of its side table: row, column, delta


def operand(encoded: Encoded, weight: Tensor, device: torch.device, *, transposed: bool = False) -> Operand:
    """The operand of a delta of `weight`, on `device`.

    Args:
        encoded: shape [*, cols]: the operand is of the matrix [prod(*), cols].
        weight: the live parameter's values, same shape, anywhere; lossless deltas are steps from them.
        transposed: the layer multiplies with the transpose of its weight; the operand is of that, [cols, prod(*)].
    """
    name = encoded.name
    columns = encoded.shape[-1] if encoded.shape else 1
    if name == "low-rank":
        made = operands.low_rank(encoded.parts["A"].to(device), encoded.parts["B"].to(device))
        if transposed:
            made = operands.low_rank(*(part.contiguous() for part in made.transpose().parts))
        return made
    packed = not transposed and (
        name in BITS
        or (name == "lossless" and weight.dtype == DTYPES[str(encoded.options["dtype"])])
        or (name == "sparse" and columns <= MOST_SPARSE_INPUTS)
    )
    if not packed:
        made = operands.dense(dense(encoded, weight, device).reshape(operands.matrix_shape(weight)))
        return made.transpose() if transposed else made
    parts = {key: part.to(device) for key, part in encoded.parts.items()}
    if name == "lossless":
        moved = Encoded(name, encoded.shape, encoded.options, parts)
        return _lossless(moved, weight.detach().to(device).reshape(-1, columns))
    if name == "sparse":
        return _sparse(parts, columns)
    if name == "int8":
        fields = parts["codes"].view(torch.uint8) ^ 128  # two's complement to offset binary
    else:
        fields = bits.unpack(parts["codes" if name == "int4" else "signs"], BITS[name], columns)
    group = int(encoded.options["group"])
    if group > columns and group & (group - 1):  # one scale a row: a group of a size that kernels need not split
        group = max(32, 1 << (columns - 1).bit_length())
    return operands.from_fields(fields, parts["scales"], BITS[name], group)


def dense(encoded: Encoded, weight: Tensor, device: torch.device) -> Tensor:
    """The delta's values [*, cols] on `device`: as stored where they are, else float32, or 16 bits where that is exact.

    float64 values are float32's for any weight but a float64 one: kernels multiply no wider than float32.
    `weight`: as for `operand`. Of a float32 weight the lossless checkpoints' dtype holds the very values.

    Raises:
        AlignvecError: float64 values that are no finite ones of float32, for a weight that is not float64.
    """
    moved = Encoded(
        encoded.name, encoded.shape, encoded.options, {key: part.to(device) for key, part in encoded.parts.items()}
    )
    if encoded.name == "dense":
        values = decode(moved)
        if values.dtype != torch.float64 or weight.dtype == torch.float64:
            return values
        if not finite(narrow := values.float()):
            raise AlignvecError(
                f"a float64 delta goes beyond float32's range, in which it is added to a weight of {weight.dtype}; "
                "load the model in float64, or scale the vector down and raise its coefficient"
            )
        return narrow
    dtype = DTYPES[str(encoded.options["dtype"])] if encoded.name == "lossless" else torch.bfloat16
    if encoded.name == "sparse":
        dtype = encoded.parts["values"].dtype
    delta = decode(moved, weight.detach().to(device, dtype) if encoded.name == "lossless" else None)
    if encoded.name == "lossless":
        _require_range(delta)
    narrow = delta.to(dtype)
    return narrow if torch.equal(narrow.float(), delta) else delta


def matrix_shape(weight: Tensor, transposed: bool) -> tuple[int, int]:
    """Of the matrix that a weight [*, cols] is multiplied as."""
    rows, columns = operands.matrix_shape(weight)
    return (columns, rows) if transposed else (rows, columns)


def _require_range(delta: Tensor) -> None:
    """Of lossless, whose decoded values the parts do not tell without the base."""
    if not finite(delta):
        raise AlignvecError("a lossless delta leaves float32's range: it was encoded against a different base")


def _lossless(encoded: Encoded, weight: Tensor) -> Operand:
    """Fields of 2, 4 or 8 bits, as many as make the fewest bytes. The lowest step marks a delta in the side table."""
    rows, columns = weight.shape
    aligned = lossless.apply(encoded, weight).view(rows, columns)
    reach = sum(max(abs(float(end)) for end in values.aminmax()) for values in (weight, aligned))
    if reach > torch.finfo(torch.float32).max:
        for block in blocks(rows, columns):
            _require_range(aligned[block].float() - weight[block].float())

    def steps() -> Iterator[tuple[slice, Tensor]]:
        return ((block, lossless.steps(weight[block], aligned[block])) for block in blocks(rows, columns))

    def nbytes(width: int) -> int:
        chunk = 32 // width * operands.plane_width(columns, width, operands.ROW)
        return rows * -(-columns // chunk) * chunk * width // 8 + ASIDE_BYTES * aside[width - 1]

    aside = torch.stack([lossless.beyond(step.abs()) for _, step in steps()]).sum(0).tolist()
    width = min(STEP_BITS, key=nbytes)
    half = 1 << (width - 1)
    fields = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    index, values = [], []
    for block, step in steps():
        far = step.abs() >= half
        where = far.view(-1).nonzero().view(-1)
        index.append(where + block.start * columns)
        values.append(aligned[block].view(-1)[where])
        fields[block] = step.masked_fill_(far, -half) + half
    return operands.from_steps(fields, width, torch.cat(index), torch.cat(values))


def _sparse(parts: dict[str, Tensor], columns: int) -> Operand:
    """The stored bitmap's bytes, four to a word, and where the values of each word begin."""
    bitmap, values = parts["bitmap"], parts["values"]
    padded = F.pad(bitmap, (0, -bitmap.shape[1] % 4)).contiguous()
    ones = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8, device=bitmap.device)
    offsets, per_row = [], []
    for block in padded.split(max(1, operands.BLOCK // padded.shape[1])):
        counts = ones[block.int()].view(len(block), -1, 4).sum(2, dtype=torch.int32)
        ends = counts.cumsum(1, dtype=torch.int32)
        offsets.append((ends - counts).to(torch.int16))  # wraps: read as unsigned
        per_row.append(ends[:, -1])
    start = F.pad(torch.cat(per_row).cumsum(0), (1, 0)).to(torch.int32)
    return Operand("sparse", (padded.view(torch.int32), torch.cat(offsets), start, values), (len(bitmap), columns))
