"""Vectors whose products overflow, and a table in which every other row does not read them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from alignvec.kernels.operands import Operand
from tests.kernels.cases import Case

HUGE = 3e38  # finite in float32 and bfloat16; two of them are not


def overflowing(operand: Operand) -> Operand:
    """The operand with the same places and signs and values of 3e38: its products are infinite, or NaN where two meet.

    Of low-rank ones A, of codes the scales, of lossless ones the side table.
    """
    parts = list(operand.parts)
    at = {"dense": 0, "low-rank": 0, "codes": 1, "lossless": 3, "sparse": 3}[operand.kind]
    parts[at] = torch.where(parts[at] < 0, -HUGE, HUGE).to(parts[at].dtype)
    return dataclasses.replace(operand, parts=tuple(parts))


def table_of(case: Case, columns: Tensor, first: float) -> Tensor:
    """[8, n]: even rows have 0 for the first of two vectors, odd ones `first`; all have 0.5 for the second."""
    table = torch.full((8, case.k + 2), torch.nan)
    table[:, columns] = torch.tensor([[0.0, 0.5], [first, 0.5]]).repeat(4, 1)
    return table


def unread(case: Case, token_rows: Tensor | None) -> Tensor:
    """Which tokens do not read the first vector, bool [tokens]."""
    rows = torch.arange(case.tokens) * int(case.rows) // case.tokens if token_rows is None else token_rows.cpu()
    return rows % 2 == 0
