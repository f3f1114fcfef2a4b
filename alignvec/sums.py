"""The integer sums that checksums of tensors are made of: of the values in bfloat16, and of what float16 makes of them.

Values are laid out as int64 words [rows, 4096], four bfloat16 a word, zero-padded at the end. Sums of rows and columns
are modulo 2**64, so that the sums of a tensor follow from those of its pieces, and those of a changed tensor from the
words that changed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

WORDS = 4096  # int64 words a row
ROW = 4 * WORDS  # bfloat16 values a row
NARROWED = 1 << 15  # values rounded to float16 at a time, and
SEARCHED = 1 << 18  # searched for such as float16 changes: both stay in a CPU's cache
FOLDED = 32  # values of which the search looks at one, first
ON_DEVICE = 128 * ROW  # values rounded at a time on other devices
# float16 holds every bfloat16 value whose magnitude has bits of this range: 2**-17 to 65280.
SMALLEST, BEYOND = 0x3700, 0x4780
SHIFT = torch.tensor((0x8000 - 2 * SMALLEST) % 0x10000, dtype=torch.uint16, device="cpu").view(torch.int16)


class Sums(NamedTuple):
    """Of whole rows, the last one padded: int64 [rows], int64 [4096], and how many values there are."""

    rows: Tensor
    columns: Tensor
    numel: int


def sums(values: Tensor) -> Sums:
    """The sums of flat bfloat16 values that begin at the beginning of a row, on any device."""
    values, count = values.contiguous(), values.numel()
    if count % ROW:
        values = nn.functional.pad(values, (0, ROW - count % ROW))
    elif values.storage_offset() % 4:  # an int64 view has to start on a word
        values = values.clone()
    words = values.view(torch.int64).view(-1, WORDS)
    return Sums(words.sum(1), words.sum(0), count)


def both_sums(values: Tensor) -> tuple[Sums, Sums]:
    """The sums of flat floating values rounded to bfloat16, and of what float16 has for them.

    The latter is rounded to bfloat16, too; of float16 values it is their own bits, whole.
    """
    from alignvec.compiled import cpu_lossless as cpu

    if cpu.takes(values) and values.numel() and (made := cpu.both_sums(values)) is not None:
        return made
    plain = sums(values.to(torch.bfloat16))
    if values.dtype == torch.float16:
        return plain, sums(values.view(torch.bfloat16))
    if values.dtype == torch.bfloat16 and values.device.type == "cpu":
        places = _changed(values)
        if places is not None:
            return plain, _corrected(plain, values, places)
    return plain, sums(as_float16(values))


def as_float16(values: Tensor) -> Tensor:
    """Flat values (bfloat16, float32, float64), rounded to float16 and then to bfloat16: bfloat16, flat."""
    flat = values.detach().reshape(-1)
    out = torch.empty(flat.numel(), dtype=torch.bfloat16, device=flat.device)
    # By way of float32, which CPUs convert the fastest.
    step = NARROWED if flat.device.type == "cpu" else ON_DEVICE
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step]
        wide = piece if piece.dtype == torch.float64 else piece.float()
        out[start : start + step].copy_(wide.half().float())
    return out


def _changed(values: Tensor) -> Tensor | None:
    """Where float16 may change flat bfloat16 values, int64 places; None if those are not few, as they are in weights.

    Zeros, infinities and NaN are among them.
    """
    bits, end = values.view(torch.int16), 2 * (BEYOND - SMALLEST) - 0x8000
    whole = values.numel() - values.numel() % SEARCHED
    tops = [
        _ordered(bits[start : start + SEARCHED]).view(FOLDED, -1).amax(0) for start in range(0, whole, SEARCHED)
    ] or [bits[:0]]
    width = SEARCHED // FOLDED
    found = (torch.cat(tops) >= end).nonzero()
    if len(found) * 2 * FOLDED > whole:
        return None
    places = (found + found // width * (SEARCHED - width) + torch.arange(0, SEARCHED, width)).view(-1)
    if whole < values.numel():
        places = torch.cat([places, torch.arange(whole, values.numel())])
    return places[_ordered(bits[places]) >= end]


def _ordered(bits: Tensor) -> Tensor:
    """int16 numbers that are the lower the less a bfloat16 value's magnitude lies above SMALLEST, and high below it."""
    return torch.add(SHIFT, bits, alpha=2)  # twice the bits: without the sign


def _corrected(plain: Sums, values: Tensor, places: Tensor) -> Sums:
    """The sums where float16 has changed the values at `places`."""
    before = values[places]
    added = _bits(as_float16(before)) - _bits(before)
    words = places // 4
    added *= torch.tensor([1, 1 << 16, 1 << 32, 1 << 48])[places % 4]  # modulo 2**64, as all of the sums
    return Sums(
        plain.rows.index_add(0, words // WORDS, added), plain.columns.index_add(0, words % WORDS, added), plain.numel
    )


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int16).to(torch.int64) & 0xFFFF
