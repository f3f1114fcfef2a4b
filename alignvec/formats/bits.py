"""Fields of 1 to 8 bits in bytes, little end first: field i of a row is the row's bits i * width to (i + 1) * width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def row_bytes(cols: int, width: int) -> int:
    """Bytes of a row of `cols` fields; every row begins at a byte."""
    return -(-cols * width // 8)


def pack(fields: Tensor, width: int) -> Tensor:
    """uint8 [rows, cols], each below 2^width -> uint8 [rows, row_bytes(cols, width)], filled up with 0 at the end."""
    if width == 8:
        return fields
    rows, cols = fields.shape
    words = (
        F.pad(fields, (0, -cols % 8)).contiguous().view(torch.int64)
    )  # 8 fields a word, moved together into `width` bytes
    for lane in (8, 16, 32):
        own = lane // 8 * width
        words = (words & _lanes(lane, own, 0)) | ((words >> (lane - own)) & _lanes(lane, own, own))
    return words.view(torch.uint8).view(rows, -1, 8)[..., :width].reshape(rows, -1)[:, : row_bytes(cols, width)]


def unpack(packed: Tensor, width: int, cols: int) -> Tensor:
    """The inverse of `pack`: uint8 [rows, cols]."""
    if width == 8:
        return packed
    rows, row = packed.shape
    groups = F.pad(packed, (0, -row % width)).reshape(rows, -1, width)
    words = F.pad(groups, (0, 8 - width)).view(torch.int64)
    for lane in (32, 16, 8):
        own = lane // 8 * width
        words = (words & _lanes(lane, own, 0)) | ((words << (lane - own)) & _lanes(lane, own, lane))
    return words.view(torch.uint8).view(rows, -1)[:, :cols]


def _lanes(lane: int, size: int, at: int) -> int:
    """A mask of `size` bits from bit `at` on, in each pair of lanes of a 64-bit word."""
    return sum(((1 << size) - 1) << (pair + at) for pair in range(0, 64, 2 * lane))


def count(packed: Tensor) -> int:
    """How many bits are set."""
    pairs = packed - ((packed >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((nibbles + (nibbles >> 4)) & 0x0F).sum())
