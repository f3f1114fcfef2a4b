"""Random numbers by counter: a function of seed and position alone, on integers, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

# The output function of SplitMix64 and its increment: Steele, Lea and Flood, "Fast splittable pseudorandom number
# generators" (OOPSLA 2014), with the constants of Vigna's splitmix64.c.
GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
BITS = 64


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) of 53 bits for each seed and position, int64 and any int [rows]: float64 [rows].

    SplitMix64 from the seed's own hash: `mix(mix(seed) + (position + 1) * GOLDEN)`, on integers that wrap.
    """
    mixed = _mix(_mix(seeds) + (positions.long() + 1) * _signed(GOLDEN))
    return _shifted(mixed, BITS - 53).double() * 2.0**-53


def _mix(values: Tensor) -> Tensor:
    for shift, factor in zip(SHIFTS[:2], FACTORS, strict=True):
        values = (values ^ _shifted(values, shift)) * _signed(factor)
    return values ^ _shifted(values, SHIFTS[-1])


def split(seed: int, index: int) -> int:
    """A seed for stream `index` of a seed; both are int64."""
    return int(_mix(_mix(torch.tensor([seed], device="cpu")) + _signed(index * GOLDEN)))


def _shifted(values: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros; torch's copies the sign."""
    return (values >> bits) & ((1 << (BITS - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the lower 64 bits of `value`."""
    return (value + (1 << 63)) % (1 << BITS) - (1 << 63)
