"""Fields of 1, 2, 4 or 8 bits in bytes, little end first: field i of a row lies in byte i // (8 // width)."""

from __future__ import annotations

import torch
from torch import Tensor


def row_bytes(cols: int, width: int) -> int:
    """Bytes of a row of `cols` fields; every row begins at a byte."""
    return -(-cols * width // 8)


def pack(fields: Tensor, width: int) -> Tensor:
    """uint8 [rows, cols], each below 2^width -> uint8 [rows, row_bytes(cols, width)], filled up with 0 at the end."""
    if width == 8:
        return fields
    rows, cols = fields.shape
    each = 8 // width
    if cols % each:
        fields = torch.nn.functional.pad(fields, (0, each - cols % each))
    fields = fields.reshape(rows, -1, each)
    packed = fields[..., 0].clone()
    for i in range(1, each):
        packed |= fields[..., i] << (i * width)
    return packed


def unpack(packed: Tensor, width: int, cols: int) -> Tensor:
    """The inverse of `pack`: uint8 [rows, cols]."""
    if width == 8:
        return packed
    each = 8 // width
    fields = torch.empty(*packed.shape, each, dtype=torch.uint8, device=packed.device)
    for i in range(each):
        torch.bitwise_and(packed >> (i * width), (1 << width) - 1, out=fields[..., i])
    return fields.view(packed.shape[0], -1)[:, :cols]


def count(packed: Tensor) -> int:
    """How many bits are set."""
    pairs = packed - ((packed >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((nibbles + (nibbles >> 4)) & 0x0F).sum())
