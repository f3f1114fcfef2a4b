"""Text of files, models and users, as a terminal may show it."""

from __future__ import annotations

import re

# What a terminal would act on: control characters, line separators, changes of the writing direction; and what it
# cannot encode: halves of a surrogate pair.
_ACTED_ON = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """The text with every character that a terminal would act on written as an escape, such as ``\\x1b`` or ``\\n``.

    ``keep``: characters that stay as they are, such as the line breaks of an answer.
    """
    return _ACTED_ON.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def shown(value: object, most: int = 80) -> str:
    """A value as text, of which the beginning is enough."""
    return _cut(value, most) if isinstance(value, str) else quoted(value, most)


def quoted(value: object, most: int = 80) -> str:
    """A value as Python writes it, of which the beginning is enough."""
    try:
        return _cut(repr(value), most)
    except ValueError:  # Python writes no integers of thousands of digits
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
