"""The magnitude that a share of many values reaches, found by counting: nothing is sorted, nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from alignvec.sources import in_order

Piece = Callable[[], Tensor]  # reads some of the values, in any shape
HALF = 1 << 15  # magnitudes that a 16-bit dtype has, and upper halves that a float32 magnitude has
NARROW = (torch.bfloat16, torch.float16)
STEP = 1 << 17  # values counted at a time, so few that they stay in cache


def threshold(pieces: Callable[[], Iterable[Piece]], density: float) -> float:
    """The magnitude that `density` of all the values reach; see ``kth``."""
    return kth(pieces, density)[0]


def kth(pieces: Callable[[], Iterable[Piece]], density: float) -> tuple[float, int]:
    """Exactly the k-th largest magnitude, k = density * count, and how many of that very magnitude are among the k.

    `pieces` gives the values' readers anew each time it is called; threads call them. Magnitudes are float32, ordered
    as their bits are: a first pass counts the upper halves of those, a second one the lower halves below the upper half
    of the k-th. Values of a 16-bit dtype are counted whole by the first, and not read again. Where fewer values than k
    differ from zero the result is the smallest positive float32: never 0.
    """
    high, wide = torch.zeros(HALF, dtype=torch.int64), []
    narrow: dict[torch.dtype, Tensor] = {}
    for dtype, counts in in_order(partial(_first, piece) for piece in pieces()):
        wide.append(dtype not in NARROW)
        if wide[-1]:
            high += counts
        else:
            narrow[dtype] = narrow.get(dtype, 0) + counts
    whole = [(_patterns(torch.arange(HALF, dtype=torch.int16).view(dtype)), n) for dtype, n in narrow.items()]
    for patterns, counts in whole:
        high.index_add_(0, patterns >> 16, counts)
    digit, rank = _reached(high, max(1, round(density * int(high.sum()))))
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for patterns, counts in whole:
        chosen = patterns >> 16 == digit
        low.index_add_(0, patterns[chosen] & 0xFFFF, counts[chosen])
    if any(wide):
        again = (piece for piece, is_wide in zip(pieces(), wide, strict=True) if is_wide)
        for counts in in_order(partial(_second, piece, digit) for piece in again):
            low += counts
    lower, rank = _reached(low, rank)
    pattern = digit << 16 | lower
    if pattern <= 0:
        pattern, rank = 1, int(high.sum())
    return float(torch.tensor(pattern, dtype=torch.int32).view(torch.float32)), rank


def _first(piece: Piece, slot: int) -> tuple[torch.dtype, Tensor]:
    """The dtype of a piece, and how many values have each magnitude (16-bit dtypes), or each upper half of one."""
    values = piece()
    counts = torch.zeros(HALF, dtype=torch.int64, device=values.device)
    for part in _parts(values):
        digits = part.view(torch.int16) & 0x7FFF if part.dtype in NARROW else _patterns(part) >> 16
        counts += torch.bincount(digits, minlength=HALF)
    return values.dtype, counts.cpu()


def _second(piece: Piece, digit: int, slot: int) -> Tensor:
    """How many magnitudes with the upper half `digit` have each lower half."""
    values = piece()
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=values.device)
    for part in _parts(values):
        patterns = _patterns(part)
        counts += torch.bincount(patterns[patterns >> 16 == digit] & 0xFFFF, minlength=len(counts))
    return counts.cpu()


def _parts(values: Tensor) -> Iterator[Tensor]:
    flat = values.reshape(-1)
    return (flat[start : start + STEP] for start in range(0, len(flat), STEP))


def _patterns(values: Tensor) -> Tensor:
    """The bits of float32 magnitudes as int32, which are in the order of the magnitudes."""
    return values.float().abs().view(torch.int32)


def _reached(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the rank-th largest, and its rank among those of that bin."""
    above = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, rank))
    return len(histogram) - 1 - place, rank - (int(above[place - 1]) if place else 0)
