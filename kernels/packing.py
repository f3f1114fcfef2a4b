"""From layers to the arguments of kernels: projections, the entries that they are split into, packed constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
from torch import Tensor

from alignvec.kernels import tiles
from alignvec.kernels.operands import Operand

# Vectors whose sums, and words that wait for their plane, stay in registers together.
ENTRY_VECTORS = 4


@dataclass(frozen=True)
class Projection:
    """One linear layer: weight [out, in], bias [out], an operand for each vector, bias deltas [k, out], columns [k]."""

    weight: Tensor
    bias: Tensor | None
    operands: Sequence[Operand]
    bias_deltas: Tensor | None
    columns: Tensor


@dataclass(frozen=True)
class Entry:
    """A projection with some of its vectors: `own`, their places in it. planes, width: of those in bit planes.

    base: it adds the base's part. number: of the projection; part: how many of its entries come before.
    """

    projection: Projection
    own: Sequence[int]
    planes: int
    width: int
    base: bool
    number: int
    part: int


def entries(projections: Sequence[Projection]) -> list[Entry]:
    """Vectors in planes by plane width, ENTRY_VECTORS at a time; the others where there is room. Lossless vectors lead:
    they need the base, which the first entry reads."""
    found = []
    for number, p in enumerate(projections):
        groups: dict[tuple[int, int], list[int]] = {}
        order = sorted(range(len(p.operands)), key=lambda i: p.operands[i].kind != "lossless")
        for i in order:
            if p.operands[i].width:
                groups.setdefault((p.operands[i].bits, p.operands[i].width), []).append(i)
        chunks = [(key, chunk) for key, own in groups.items() for chunk in _even(own)]
        plain = [i for i in order if not p.operands[i].width]
        for _, chunk in chunks:
            while plain and len(chunk) < ENTRY_VECTORS:
                chunk.append(plain.pop())
        chunks += [((0, 0), chunk) for chunk in _even(plain)]
        for part, ((bits, width), own) in enumerate(chunks or [((0, 0), [])]):
            found.append(Entry(p, own, 32 // bits if bits else 1, width, part == 0, number, part))
    return found


def _even(items: list[int]) -> list[list[int]]:
    """In as few chunks of up to ENTRY_VECTORS as there can be, of nearly one size."""
    count = -(-len(items) // ENTRY_VECTORS)
    return [items[n * len(items) // count : (n + 1) * len(items) // count] for n in range(count)]


def layer(p: Projection, own: Sequence[int], column: int, tile: int, part: int) -> tuple[tuple[object, ...], ...]:
    """pointers, sizes and numbers of one entry, as `split_kernel` describes them."""
    operands = [p.operands[i] for i in own]
    bias, bias_d = p.bias, p.bias_deltas
    pointers = (p.weight, p.weight if bias is None else bias, p.weight if bias_d is None else bias_d, p.columns)
    steps = [(o.group // max(o.width, 1)).bit_length() - 1 for o in operands]  # log2 of the planes of a group
    sizes = tuple((*s, i, step) for s, i, step in zip(tiles.sizes(operands), own, steps, strict=True))
    strides = (0 if bias is None else bias.stride(0), *((0, 0) if bias_d is None else bias_d.stride()))
    numbers = (p.weight.shape[0], column, tile, *p.weight.stride(), *strides, part)
    return (*pointers, tiles.parts(operands)), sizes, numbers


def biases(p: Projection) -> int:
    """Two bits: a bias, bias deltas."""
    return (p.bias is not None) | (p.bias_deltas is not None) << 1


def pack(
    found: Sequence[Entry], block_n: int, block_k: int, split_k: int
) -> tuple[tuple[tuple[object, ...], ...], dict[str, int], int]:
    """The arguments of all entries, their packed constants, and how many tiles of outputs they have in all."""
    arguments = []
    constants = dict.fromkeys(("VECTORS", "SPECS", "BIASES", "BASES", "STEPS"), 0)
    firsts: dict[int, int] = {}
    column = tile = 0
    for j, e in enumerate(found):
        out_features = e.projection.weight.shape[0]
        if e.number not in firsts:
            firsts[e.number] = column
            column += out_features
        arguments.append(layer(e.projection, e.own, firsts[e.number], tile, e.part * split_k))
        step = e.width or block_k
        constants["VECTORS"] |= len(e.own) << 8 * j
        constants["SPECS"] |= tiles.specs([e.projection.operands[i] for i in e.own]) << 32 * j
        constants["BIASES"] |= biases(e.projection) << 2 * j
        constants["BASES"] |= e.base << j
        constants["STEPS"] |= (e.planes.bit_length() - 1 | (step.bit_length() - 1) << 4) << 8 * j
        tile += triton.cdiv(out_features, block_n)
    pointers, sizes, numbers = zip(*arguments, strict=True)
    return (pointers, sizes, numbers), constants | {"ENTRIES": len(found)}, tile
