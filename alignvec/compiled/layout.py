"""Operands as the compiled operators' schemas carry them: numbers and tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from alignvec.kernels.operands import Operand

# As csrc counts them. Zero: a vector that leaves a weight alone, without parts.
KINDS = {"dense": 0, "codes": 1, "lossless": 2, "sparse": 3, "low-rank": 4, "zero": 5}


def layout(operands: Iterable[Operand]) -> tuple[list[int], list[Tensor]]:
    """Four numbers an operand (kind, bits, width, group), and the tensors of all of them."""
    numbers: list[int] = []
    parts: list[Tensor] = []
    for operand in operands:
        numbers += (KINDS[operand.kind], operand.bits, operand.width, operand.group)
        parts += operand.parts
    return numbers, parts
