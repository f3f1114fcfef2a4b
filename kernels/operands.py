"""Operands: one vector's delta of one matrix in the form that kernels read, and its decoding in plain torch.

| kind | parts | delta[n, k] |
| --- | --- | --- |
| dense | values [out, in], any strides | values[n, k] |
| codes | words int32 [out, words], scales [out, groups] | scales[n, k // group] * field(n, k) |
| lossless | words, start int32 [out + 1], columns int32 [e], values [e], rows int32 [e] | field(n, k) ULPs of W |
| sparse | bitmap int32 [out, ceil(in / 32)], offsets int16 alike, start int32 [out + 1], values [nnz] | 0, or a value |
| low-rank | A [rank, in], B [out, rank] | (B A)[n, k] |

Fields of 1, 2, 4 or 8 bits lie in *bit planes*: a chunk of `width` words holds `32 / bits` planes of `width` inputs,
and plane p of word w is the field of input `p width + w` of the chunk, at bit `p bits`. A kernel loads the words of a
chunk once and has each plane by a shift and a mask, in place, for `width` consecutive inputs. One bit is a sign, set
for -1; wider fields are offset binary. A lossless field of 0 marks a weight whose aligned value is in the side table,
by row and column (`start` is where a row begins): its step is too large for the field, or the lowest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_VECTORS = 16  # that edit one parameter
PARTS = {"dense": 1, "codes": 2, "lossless": 5, "sparse": 4, "low-rank": 2}
ROW = 1 << 30  # inputs that share a scale when a row has one
BLOCK = 1 << 22  # values unpacked at a time while an operand is made


@dataclass(frozen=True)
class Operand:
    """One vector's delta of a matrix [out, in]. bits, width: of the fields; group: inputs that share a scale."""

    kind: str
    parts: tuple[Tensor, ...]
    shape: tuple[int, int]
    bits: int = 0
    width: int = 0
    group: int = ROW

    @property
    def spec(self) -> str:
        """All but the tensors, as text: what an operator's schema can carry."""
        return f"{self.kind}:{self.bits}:{self.width}:{self.group}"

    @property
    def nbytes(self) -> int:
        """Bytes that a kernel reads of it at most."""
        return sum(part.nbytes for part in self.parts)

    def to(self, device: torch.device) -> Operand:
        parts = tuple(part.to(device) for part in self.parts)
        return Operand(self.kind, parts, self.shape, self.bits, self.width, self.group)

    def transpose(self) -> Operand:
        """The operand of the transposed matrix, where that is a view: dense and low-rank."""
        assert self.kind in ("dense", "low-rank")
        parts = tuple(part.t() for part in reversed(self.parts))
        return Operand(self.kind, parts, (self.shape[1], self.shape[0]))


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Of the matrix [prod(*), columns] that a parameter [*, columns] is to operands; of one number, [1, 1]."""
    return math.prod(weight.shape[:-1]), weight.shape[-1] if weight.dim() else 1


def dense(values: Tensor) -> Operand:
    """values [out, in] of a floating dtype, any strides."""
    return Operand("dense", (values,), (values.shape[0], values.shape[1]))


def low_rank(a: Tensor, b: Tensor) -> Operand:
    """A [rank, in], B [out, rank]."""
    return Operand("low-rank", (a, b), (b.shape[0], a.shape[1]))


def parse(specs: Sequence[str], parts: Sequence[Tensor], shape: tuple[int, int]) -> list[Operand]:
    """The operands that `specs` and the tensors of all of them, in one list, stand for."""
    operands, position = [], 0
    for spec in specs:
        kind, numbers, count = _read_spec(spec)
        operands.append(Operand(kind, tuple(parts[position : position + count]), shape, *numbers))
        position += count
    return operands


@functools.cache
def _read_spec(spec: str) -> tuple[str, tuple[int, int, int], int]:
    """Kind, the three numbers, and how many tensors belong to it."""
    kind, bits, width, group = spec.split(":")
    return kind, (int(bits), int(width), int(group)), PARTS[kind]


def plane_width(in_features: int, bits: int, group: int) -> int:
    """Inputs in a plane: 64, a full line of 16-bit weights, or fewer where a group or a narrow matrix needs it."""
    width = min(64, group)
    while width > 16 and -(-in_features // (width * 32 // bits)) * width * 32 // bits > in_features * 9 / 8:
        width //= 2
    return width


def pack_planes(fields: Tensor, bits: int, width: int) -> Tensor:
    """Fields uint8 [out, in] into words int32 [out, chunks * width]."""
    planes = 32 // bits
    pad = -fields.shape[1] % (planes * width)
    rows = max(1, BLOCK // max(fields.shape[1] + pad, 1))
    shifts = (torch.arange(planes, dtype=torch.int32, device=fields.device) * bits)[:, None]
    words = []
    for block in fields.split(rows):
        chunks = F.pad(block, (0, pad)).view(block.shape[0], -1, planes, width).to(torch.int32)
        words.append((chunks << shifts).sum(2, dtype=torch.int32).flatten(1))
    return torch.cat(words)


def unpack_planes(words: Tensor, bits: int, width: int, in_features: int) -> Tensor:
    """The inverse: int32 [out, in_features]."""
    planes = 32 // bits
    shifts = (torch.arange(planes, dtype=torch.int32, device=words.device) * bits)[:, None]
    fields = (words.view(words.shape[0], -1, 1, width) >> shifts) & ((1 << bits) - 1)
    return fields.flatten(1)[:, :in_features]


def from_fields(fields: Tensor, scales: Tensor, bits: int, group: int) -> Operand:
    """Codes from fields uint8 [out, in] and scales [out, groups]; group 0: one scale a row, else a multiple of 16."""
    if group & (group - 1):  # kernels count groups by shifts: a scale is repeated for each power of two in its group
        scales = scales.repeat_interleave(group // (group & -group), 1)[:, : -(-fields.shape[1] // (group & -group))]
        group &= -group
    width = plane_width(fields.shape[1], bits, group or ROW)
    shape = (fields.shape[0], fields.shape[1])
    words = pack_planes(fields, bits, width)
    return Operand("codes", (words, scales.contiguous()), shape, bits, width, group or ROW)


def decode(operand: Operand, weight: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
    """The delta of those rows, float32 [rows, in]; lossless needs the base's `weight` [out, in]."""
    if operand.kind == "dense":
        return operand.parts[0][rows].float()
    if operand.kind == "low-rank":
        a, b = operand.parts
        return b[rows].float() @ a.float()
    if operand.kind == "sparse":
        return _decode_sparse(operand, rows)
    fields = unpack_planes(operand.parts[0][rows], operand.bits, operand.width, operand.shape[1])
    if operand.kind == "lossless":
        assert weight is not None
        return _decode_lossless(operand, fields, weight[rows], rows)
    values = (1 - 2 * fields if operand.bits == 1 else fields - (1 << (operand.bits - 1))).float()
    scales = operand.parts[1][rows].float()
    if scales.shape[1] == 1:
        return values * scales
    return values * scales.repeat_interleave(operand.group, 1)[:, : values.shape[1]]


def ordered(bits: Tensor) -> Tensor:
    """The bit pattern of a 16-bit float as an int16 that counts ULPs, its own inverse."""
    return bits ^ ((bits >> 15) & 0x7FFF)


def aligned(operand: Operand, weight: Tensor, rows: slice = slice(None)) -> Tensor:
    """Those rows of the weight with a lossless delta added, bit for bit, in the weight's dtype."""
    fields = unpack_planes(operand.parts[0][rows], operand.bits, operand.width, operand.shape[1])
    stepped = _stepped(operand, fields, weight[rows])
    row, column, values = _side(operand, rows)
    stepped[row, column] = values.to(weight.dtype)
    return stepped


def _stepped(operand: Operand, fields: Tensor, weight: Tensor) -> Tensor:
    step = torch.where(fields == 0, 0, fields - (1 << (operand.bits - 1)))
    bits = weight.contiguous().view(torch.int16)
    return ordered((ordered(bits).int() + step).to(torch.int16)).view(weight.dtype)


def _side(operand: Operand, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Row within `rows`, column and value of the side table's entries there."""
    _, start, columns, values, row = operand.parts
    first, last, _ = rows.indices(operand.shape[0])
    own = slice(int(start[first]), int(start[last])) if last > first else slice(0)
    return row[own].long() - first, columns[own].long(), values[own]


def _decode_lossless(operand: Operand, fields: Tensor, weight: Tensor, rows: slice) -> Tensor:
    delta = _stepped(operand, fields, weight).float() - weight.float()
    row, column, values = _side(operand, rows)
    delta[row, column] = values.float() - weight[row, column].float()
    return delta


def _decode_sparse(operand: Operand, rows: slice) -> Tensor:
    bitmap, _, start, values = operand.parts
    first, last, _ = rows.indices(operand.shape[0])
    bits = (bitmap[rows, :, None] >> torch.arange(32, dtype=torch.int32, device=bitmap.device)) & 1
    mask = bits.flatten(1)[:, : operand.shape[1]].bool()
    delta = torch.zeros(mask.shape, dtype=torch.float32, device=values.device)
    delta[mask] = values[int(start[first]) : int(start[last])].float() if last > first else values[:0].float()
    return delta


def from_steps(fields: Tensor, bits: int, index: Tensor, values: Tensor) -> Operand:
    """Lossless from fields uint8 [out, in] and the flat, ascending positions and aligned weights of the side table.

    A field that is 0 has to be in the side table.
    """
    out_features, in_features = fields.shape
    row = index // in_features
    width = plane_width(in_features, bits, ROW)
    start, columns = _starts(row, out_features), (index % in_features).to(torch.int32)
    parts = (pack_planes(fields, bits, width), start, columns, values, row.to(torch.int32))
    return Operand("lossless", parts, (out_features, in_features), bits, width)


def from_mask(mask: Tensor, values: Tensor) -> Operand:
    """Sparse from where values are, bool [out, in], and the values [nnz] in row-major order."""
    out_features, in_features = mask.shape
    words = F.pad(mask, (0, -in_features % 32)).view(out_features, -1, 32)
    shifts = torch.arange(32, dtype=torch.int32, device=mask.device)
    bitmap = (words.to(torch.int32) << shifts).sum(2, dtype=torch.int32)
    counts = words.sum(2, dtype=torch.int32)
    offsets = (counts.cumsum(1, dtype=torch.int32) - counts).to(torch.int16)  # wraps: read as unsigned
    per_row = counts.sum(1)
    start = F.pad(per_row.cumsum(0), (1, 0)).to(torch.int32)
    return Operand("sparse", (bitmap, offsets, start, values), (out_features, in_features))


def _starts(row: Tensor, rows: int) -> Tensor:
    return F.pad(torch.bincount(row, minlength=rows).cumsum(0), (1, 0)).to(torch.int32)
