"""auto: a format for each tensor, so that the vector fits a number of bytes with the smallest squared error.

The error of the whole is the sum of the tensors' own, so bytes go where one more buys the largest drop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from alignvec import formats
from alignvec.errors import AlignvecError
from alignvec.formats import lossless
from alignvec.formats.spec import Spec, matrix

# Cheapest first, as a rule. Low ranks pay where alignment changed few directions, and below one bit a weight.
CANDIDATES = (
    "low-rank:rank=4",
    "low-rank:rank=16",
    "sign",
    "sign:group=128",
    "int4",
    "int4:group=32",
    "int8",
    "lossless",
    "dense",
)

Choice = tuple[Spec, int, float]  # a format, the bytes it takes, and the squared error it makes


def fraction(text: str) -> float | None:
    """0.25 for "auto:0.25", the share of the dense vector's bytes; None for a text that is not about auto.

    Raises AlignvecError for a share that is not above 0 and at most 1.
    """
    name, _, value = text.strip().partition(":")
    if name != "auto":
        return None
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise AlignvecError(
            f"format {text!r}: give the share of the dense bytes, above 0 and at most 1, as in auto:0.25"
        )
    return share


def candidates(dimensions: int) -> list[Spec]:
    """The formats that a delta of so many dimensions may get."""
    return [formats.parse(text) for text in (CANDIDATES if dimensions > 1 else ("dense",))]


def measure(
    spec: Spec, delta: Tensor, base: Tensor | None = None, name: str = "", *, aligned: Tensor | None = None
) -> Choice | None:
    """What a format makes of one delta, given in the dtype that `dense` would keep.

    None where it cannot hold the delta: `lossless` takes a 16-bit pair of base and aligned, and a low rank or a scale
    of very large values can leave the numbers' range.
    """
    if spec.name == "lossless" and delta.numel():
        rows, cols = matrix(tuple(delta.shape))
        try:
            return spec, lossless.nbytes(lossless.far(delta, base, aligned, name), rows, cols), 0.0
        except AlignvecError:
            return None
    encoded = formats.encode(spec, delta, base, name, aligned=aligned)
    error = 0.0 if encoded.name == "dense" else formats.squared_error(encoded, delta, base)
    return (spec, encoded.nbytes, error) if math.isfinite(error) else None


def choose(errors_and_bytes: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Spec]:
    """One of each tensor's choices, at most `budget` bytes in all, with the smallest total squared error.

    Greedy along the lower convex hull of each tensor's errors over bytes, the steepest drop per byte first: optimal at
    the budgets where a step ends. Raises AlignvecError for a budget below the cheapest choices.
    """
    hulls = {name: _hull(choices) for name, choices in errors_and_bytes.items()}
    spent = sum(hull[0][1] for hull in hulls.values())
    if spent > budget:
        raise AlignvecError(f"{budget} bytes are too few: the smallest formats of these tensors take {spent}")
    taken = dict.fromkeys(hulls, 0)
    steps = [
        (_slope(hull[place - 1], hull[place]), key, place)
        for key, hull in hulls.items()
        for place in range(1, len(hull))
    ]
    for _, name, place in sorted(steps):
        more = hulls[name][place][1] - hulls[name][place - 1][1]
        if taken[name] == place - 1 and spent + more <= budget:
            taken[name], spent = place, spent + more
    return {name: hull[taken[name]][0] for name, hull in hulls.items()}


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of error over bytes, from the cheapest on, each with less error."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice[1], choice[2])):
        if hull and choice[2] >= hull[-1][2]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(first: Choice, second: Choice) -> float:
    return (second[2] - first[2]) / (second[1] - first[1])
