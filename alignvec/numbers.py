"""Numbers that users give, for tables that are float32 on the device."""

from __future__ import annotations

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
