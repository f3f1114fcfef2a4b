"""The coefficients of a call in plain torch: which tokens share a mix, and what a token that is at 0 gets of a vector.

A coefficient of 0 means that the token does not read the vector. Where a batch is computed together its product is left
out by a choice, never by a multiplication: it may be infinite, and 0 times that is NaN.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from alignvec.kernels.reference import token_coefficients

# One mix as (vector, coefficient) pairs without the zeros, and a span of tokens [first, last) that share it.
Mix = list[tuple[int, float]]
Run = tuple[int, int, Mix]


@dataclass(frozen=True)
class PerToken:
    """A vector's coefficient for every token.

    values: [tokens, 1]. zero: where they are 0, bool [tokens, 1]; None where the host sees that none is.
    """

    values: Tensor
    zero: Tensor | None

    @staticmethod
    def of(values: Tensor) -> PerToken:
        zero = values == 0
        return PerToken(values, None if values.is_cpu and not zero.any() else zero)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """`total[m] += c[m] (left[m] right)`: left [tokens, n], right [n, features], total [tokens, features]."""
        scaled = left * self.values  # one float32 rounding; right, a weight, stays as it is
        if self.zero is None:
            total.addmm_(scaled, right)
        else:
            total += (scaled @ right).masked_fill_(self.zero, 0)

    def add(self, total: Tensor, edit: Tensor) -> None:
        """`total[m] += c[m] edit`: edit [features]."""
        weighted = edit * self.values
        total += weighted if self.zero is None else weighted.masked_fill_(self.zero, 0)


# The same where coefficients stay on the device.
DeviceMix = list[tuple[int, PerToken]]


def device_mix_of(
    tokens: int, runs: list[Run] | None, columns: Tensor, table: Tensor, rows: Tensor, token_rows: Tensor | None
) -> DeviceMix:
    c = token_coefficients(table, rows, columns, tokens, token_rows)
    used = {i for *_, mix in runs for i, _ in mix} if runs else range(len(columns))
    return [(i, PerToken.of(c[:, i, None])) for i in used]


def runs_of(tokens: int, columns: Tensor, table: Tensor, rows: Tensor, token_rows: Tensor | None) -> list[Run] | None:
    """The tokens in runs of one mix each, read from host memory; None for no tokens, or where `rows` does not fit."""
    if token_rows is not None:
        mixes = table.tolist()
        spans = [(row, len(list(span))) for row, span in itertools.groupby(token_rows.tolist())]
    else:
        count = int(rows)
        if tokens == 0 or tokens % count:
            return None
        mixes = table[:count].tolist()
        spans = [(row, tokens // count) for row in range(count)]
    used = columns.tolist()
    runs: list[Run] = []
    start = 0
    for row, length in spans:
        mix = [(i, mixes[row][column]) for i, column in enumerate(used) if mixes[row][column] != 0]
        first = runs.pop()[0] if runs and runs[-1][2] == mix else start
        start += length
        runs.append((first, start, mix))
    return runs


def readers(c: Tensor) -> list[tuple[bool, bool]]:
    """Of each vector whether some token reads it, and whether all do, as far as the host sees: c [tokens, k]."""
    if not c.is_cpu:
        return [(True, False)] * c.shape[1]
    used = c != 0
    return list(zip(used.any(0).tolist(), used.all(0).tolist(), strict=True))


def widened(t: Tensor) -> Tensor:
    """`t` in float32, or in float64 where it is: what sums are made in."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
