"""Numbers that users give, for tables that are float32 on the device."""

from __future__ import annotations

import math
from typing import Any

from alignvec.errors import AlignvecError
from alignvec.printable import quoted

# From here on a number is infinite in float32: halfway between its largest one, 2**128 - 2**104, and 2**128.
BEYOND_FLOAT32 = 2.0**128 - 2.0**103


def float32_number(value: Any, what: str, name: object) -> float:
    """The value as a float, which float32 can hold, too. what, name: which number it is, for messages.

    Raises:
        AlignvecError: it is no number, not finite, or infinite in float32.
    """
    try:
        number = float("" if isinstance(value, (str, bytes, bytearray)) else value)  # text is no number
    except OverflowError:
        number = BEYOND_FLOAT32
    except (TypeError, ValueError, RuntimeError):  # the last is torch's, of a tensor with several elements
        raise AlignvecError(f"{what} {name!r} must be a number, not {quoted(value)}") from None
    if not -BEYOND_FLOAT32 < number < BEYOND_FLOAT32:
        raise AlignvecError(f"{what} {name!r} is {quoted(value)}; it must be finite, also in float32 (below 3.4e38)")
    return number


def float64_sum(total: float, what: str) -> float:
    """The sum of products that ``what`` needs, in float64.

    Raises:
        AlignvecError: it overflowed, as squares of float64 values beyond 1e154 do.
    """
    if not math.isfinite(total):
        raise AlignvecError(f"{what} cannot be told, for squares overflow float64: multiply by a small number first")
    return total
