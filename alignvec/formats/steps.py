"""Steps between two 16-bit floats: counted, packed into fields of a few bits, and walked again.

By csrc/cpu where that is live; what is here in plain torch runs everywhere, and is the truth that csrc is held to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alignvec.formats import bits
from alignvec.formats.spec import blocks

CHANGED = 0  # the place of the steps that are not 0 among the counts


class Counted(NamedTuple):
    """How two tensors differ. ``far``: how many steps do not fit fields of 1, 2, ... 8 bits, int64 [8]."""

    changed: int
    far: Tensor
    square: float  # the squared norm of the difference: finite where all values are, and all differences in float32

    def __add__(self, other: object) -> Counted:
        if not isinstance(other, Counted):
            return NotImplemented
        return Counted(self.changed + other.changed, self.far + other.far, self.square + other.square)


class Packed(NamedTuple):
    """Rows of steps: fields uint8 [rows, bytes], and of those that do not fit how many each row has, int64 [rows],
    their columns and their aligned values' bits, int16. ``finite``: whether all values are, of both sides."""

    fields: Tensor
    aside: Tensor
    columns: Tensor
    own: Tensor
    finite: bool


def nothing() -> Counted:
    return Counted(0, torch.zeros(8, dtype=torch.int64), 0.0)


def count(base: Tensor, aligned: Tensor) -> Counted:
    """How two tensors of one 16-bit dtype and one shape differ."""
    from alignvec.compiled import cpu_lossless as cpu

    return cpu.count(base, aligned) if cpu.takes(base, aligned) else count_in_torch(base, aligned)


def count_in_torch(base: Tensor, aligned: Tensor) -> Counted:
    found, base, aligned = nothing(), base.reshape(-1), aligned.reshape(-1)
    for block in blocks(base.numel(), 1):
        step = ordered(aligned[block]).sub_(ordered(base[block]))
        far = beyond(reach(step)).to(torch.int64).cpu()
        delta = (aligned[block].float() - base[block].float()).double()
        found += Counted(int(step.count_nonzero()), far, float(torch.dot(delta, delta)))
    return found


def pack(base: Tensor, aligned: Tensor, width: int) -> Packed:
    """The steps between matrices [rows, cols] of one 16-bit dtype."""
    from alignvec.compiled import cpu_lossless as cpu

    (rows, cols), compiled = base.shape, cpu.takes(base, aligned)
    fields = torch.empty(rows, bits.row_bytes(cols, width), dtype=torch.uint8, device=base.device)
    aside = torch.empty(rows, dtype=torch.int64, device=base.device)
    columns = [torch.empty(0, dtype=columns_dtype(cols), device=base.device)]
    own, finite = [torch.empty(0, dtype=torch.int16, device=base.device)], True
    for block in blocks(rows, cols):
        piece = (cpu.pack if compiled else pack_in_torch)(base[block], aligned[block], width)
        fields[block], aside[block] = piece.fields, piece.aside
        columns.append(piece.columns)
        own.append(piece.own)
        finite = finite and piece.finite
    return Packed(fields, aside, torch.cat(columns), torch.cat(own), finite)


def pack_in_torch(base: Tensor, aligned: Tensor, width: int) -> Packed:
    (rows, cols), half = base.shape, 1 << (width - 1)
    before, after = ordered(base), ordered(aligned)
    finite = numbers(before, base.dtype) and numbers(after, base.dtype)
    step = after.sub_(before)
    where = (reach(step) >= half).view(-1).nonzero().view(-1)
    count = torch.bincount(where // max(cols, 1), minlength=rows)
    own = aligned.contiguous().view(torch.int16).view(-1)[where]
    step.view(-1)[where] = 0
    fields = bits.pack(step.add_(half).to(torch.uint8), width)
    return Packed(fields, count, (where % max(cols, 1)).to(columns_dtype(cols)), own, finite)


def walk(base: Tensor, width: int, fields: Tensor, start: Tensor, columns: Tensor, own: Tensor, out: Tensor) -> bool:
    """Writes the aligned rows [rows, cols] to `out`, which is contiguous; whether base and steps' ends are finite.

    `start` [rows + 1]: where the rows' entries begin in the whole side table, whose columns are columns of a row.
    """
    from alignvec.compiled import cpu_lossless as cpu

    compiled = cpu.takes(base, out) and all(t.device == base.device for t in (fields, start, columns, own))
    one = cpu.walk if compiled else walk_in_torch
    return all(
        one(base[block], width, fields[block], start[block.start : block.stop + 1], columns, own, out[block])
        for block in blocks(*base.shape)
    )


def walk_in_torch(
    base: Tensor, width: int, fields: Tensor, start: Tensor, columns: Tensor, own: Tensor, out: Tensor
) -> bool:
    number = ordered(base)
    known = numbers(number, base.dtype)  # then no step that a field holds leaves int16
    number += bits.unpack(fields, width, base.shape[1])
    number -= 1 << (width - 1)
    if not (known and numbers(number, base.dtype)):
        return False
    h = ordered(number)
    row, column, aside = side(start, columns, own)
    h[row, column] = aside
    out.copy_(h.view(base.dtype))
    return True


def side(start: Tensor, columns: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and bits of the side table's entries in rows that begin at `start`: int64, int64, int16."""
    entries = slice(*start[[0, -1]].tolist())
    row = torch.arange(len(start) - 1, device=start.device).repeat_interleave(start.diff())
    return row, columns[entries].to(torch.int64), own[entries]


def ordered(values: Tensor) -> Tensor:
    """The bits of 16-bit floats as int16 in the order of the numbers; -0.0 comes right before 0.0."""
    h = values.contiguous().view(torch.int16)
    order = h >> 15
    order &= 0x7FFF
    order ^= h
    return order


def reach(step: Tensor) -> Tensor:
    """step, or -1 - step of a negative one: below 2^(width-1) where a field of `width` bits holds the step."""
    return step ^ (step >> 15)


def beyond(reach: Tensor) -> Tensor:
    """How many of some integers >= 0 are at least 1, 2, 4, ... 128: int32 [8]."""
    return torch.stack([(reach >> place).clamp_(max=1).sum(dtype=torch.int32) for place in range(8)])


def numbers(order: Tensor, dtype: torch.dtype) -> bool:
    """Whether the numbers of this order (`ordered`, int16) are all finite."""
    if not order.numel():
        return True
    lowest, highest = (int(end) for end in order.aminmax())
    return -largest(dtype) - 1 <= lowest and highest <= largest(dtype)


def largest(dtype: torch.dtype) -> int:
    """The bits of the largest finite number."""
    return int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16))


def columns_dtype(cols: int) -> torch.dtype:
    return torch.uint16 if cols <= 1 << 16 else torch.int32
