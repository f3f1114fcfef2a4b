"""lossless: how many representable numbers lie between the base's 16-bit weight and the aligned one.

    ordered(h) = h ^ ((h >> 15) & 0x7FFF)    of the int16 bits h: neighbouring numbers become neighbouring integers
    step       = ordered(aligned) - ordered(base)

Steps are `width`-bit fields, width chosen from the data: 1/4, 1/2 or 1 byte a weight. Those out of a field's range,
-2^(width-1) to 2^(width-1) - 1, lie in a side table of 12 bytes each, and their field says 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.formats import bits
from alignvec.formats.spec import Encoded, Option, Spec, blocks, finite, matrix, span

OPTIONS: dict[str, Option] = {"width": 0, "dtype": ""}  # 0: the width that takes fewest bytes; dtype: the base's
WIDTHS = (2, 4, 8)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SIDE_BYTES = 12


def validate(spec: Spec) -> None:
    if spec.options["width"] not in (0, *WIDTHS):
        raise AlignvecError(
            f"format lossless: width={spec.options['width']} must be 2, 4, 8, or 0 to choose by the data"
        )
    if spec.options["dtype"] not in ("", *DTYPES):
        raise AlignvecError(f"format lossless: dtype={spec.options['dtype']} must be bfloat16 or float16")


def encode(spec: Spec, delta: Tensor, base: Tensor | None, aligned: Tensor | None, name: str) -> Encoded:
    """Needs `base`; without `aligned` that is base + delta, and delta has to be their difference exactly."""
    (rows, cols), shape = matrix(tuple(delta.shape)), tuple(delta.shape)
    if base is None:
        raise AlignvecError(f"format lossless needs the base's values of {name}")
    for tensor in (base,) if aligned is None else (base, aligned):
        if tensor.dtype != base.dtype or tensor.dtype not in DTYPES.values():
            raise AlignvecError(
                f"{name} is {tensor.dtype}: lossless stores pairs of bfloat16, or of float16, checkpoints"
            )
    steps = _Steps(
        delta.reshape(rows, cols),
        base.reshape(rows, cols),
        None if aligned is None else aligned.reshape(rows, cols),
        name,
    )
    width = int(spec.options["width"]) or _width(steps, rows, cols)
    options: dict[str, Option] = {"width": width, "dtype": str(base.dtype).removeprefix("torch.")}
    half = 1 << (width - 1)
    packed = torch.empty(rows, bits.row_bytes(cols, width), dtype=torch.uint8, device=delta.device)
    index, values = [], []
    for block, step in steps:
        far = (step < -half) | (step >= half)
        where = far.view(-1).nonzero().view(-1)
        index.append(where + block.start * cols)
        values.append(step.view(-1)[where])
        packed[block] = bits.pack((step.masked_fill_(far, 0) + half).to(torch.uint8), width)
    return Encoded(
        "lossless", shape, options, {"steps": packed, "side_index": torch.cat(index), "side_steps": torch.cat(values)}
    )


class _Steps:
    """The steps, int32 [n, cols], some rows at a time; iterating again computes them again."""

    def __init__(self, delta: Tensor, base: Tensor, aligned: Tensor | None, name: str) -> None:
        self.delta, self.base, self.aligned, self.name = delta, base, aligned, name

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for block in blocks(*self.base.shape):
            base = self.base[block]
            aligned = self._sum(block) if self.aligned is None else self.aligned[block]
            if not (finite(base) and finite(aligned)):
                raise AlignvecError(f"{self.name} holds NaN or infinity in the base or the aligned checkpoint")
            yield block, ordered(aligned).to(torch.int32) - ordered(base)

    def _sum(self, block: slice) -> Tensor:
        base, delta = self.base[block], self.delta[block]
        aligned = (base.double() + delta.double()).to(base.dtype)
        if not torch.equal(aligned.float() - base.float(), delta.float()):
            raise AlignvecError(
                f"delta {self.name} is no difference of two {base.dtype} tensors, which is what lossless stores: "
                "choose another format"
            )
        return aligned


def _width(steps: _Steps, rows: int, cols: int) -> int:
    far = dict.fromkeys(WIDTHS, 0)
    for _, step in steps:
        reach = torch.where(step < 0, -1 - step, step)
        for width in WIDTHS:
            far[width] += int((reach >= 1 << (width - 1)).sum())
    return min(WIDTHS, key=lambda width: rows * bits.row_bytes(cols, width) + SIDE_BYTES * far[width])


def ordered(values: Tensor) -> Tensor:
    """The bits of 16-bit floats as int16 in the order of the numbers; -0.0 comes right before 0.0."""
    h = values.contiguous().view(torch.int16)
    return h ^ ((h >> 15) & 0x7FFF)


def apply(encoded: Encoded, base: Tensor, rows: slice | None = None) -> Tensor:
    """The aligned parameter, bit for bit, in the base's dtype: [n, cols], or the parameter's shape without `rows`.

    `base`: the same parameter, or the same rows of it. Raises AlignvecError when it is not the base of this delta.
    """
    count, cols = matrix(encoded.shape)
    start, stop = span(rows, count)
    dtype, width = DTYPES[str(encoded.options["dtype"])], int(encoded.options["width"])
    if base.dtype != dtype or base.numel() != (stop - start) * cols:
        raise AlignvecError(
            f"this lossless delta is of a {dtype} base {[stop - start, cols]}, not of {base.dtype} {list(base.shape)}"
        )
    index, side = encoded.parts["side_index"], encoded.parts["side_steps"]
    bounds = torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16).item()
    out = torch.empty(stop - start, cols, dtype=dtype, device=base.device)
    base = base.reshape(stop - start, cols)
    for block in blocks(stop - start, cols):
        first, last = (start + block.start) * cols, (start + block.stop) * cols
        fields = bits.unpack(encoded.parts["steps"][start + block.start : start + block.stop], width, cols)
        number = ordered(base[block]).to(torch.int32) + fields
        number -= 1 << (width - 1)
        low, high = torch.searchsorted(index, torch.tensor([first, last], device=index.device)).tolist()
        number.view(-1)[index[low:high] - first] += side[low:high]
        if number.numel() and not (-bounds - 1 <= number.amin() and number.amax() <= bounds):
            raise AlignvecError("a lossless delta leads out of the numbers' range: it was encoded against another base")
        h = number.to(torch.int16)
        out[block] = (h ^ ((h >> 15) & 0x7FFF)).view(dtype)
    return out.view(encoded.shape) if rows is None else out


def decode(encoded: Encoded, base: Tensor | None, rows: slice | None) -> Tensor:
    """float32(aligned) - float32(base), [n, cols]."""
    count, cols = matrix(encoded.shape)
    start, stop = span(rows, count)
    if base is None:
        raise AlignvecError("a lossless delta can be read with its base's values only: load it with the base")
    base = base.reshape(-1, cols)
    return apply(encoded, base, slice(start, stop)).float() - base.float()


def layout(
    spec: Spec, shape: tuple[int, ...]
) -> dict[str, tuple[torch.dtype, tuple[int, int]] | tuple[torch.dtype, tuple[None]]]:
    (rows, cols), width = matrix(shape), int(spec.options["width"])
    if not width or not spec.options["dtype"]:
        raise AlignvecError("an encoded lossless tensor has a width and a dtype")
    return {
        "steps": (torch.uint8, (rows, bits.row_bytes(cols, width))),
        "side_index": (torch.int64, (None,)),
        "side_steps": (torch.int32, (None,)),
    }


def check(encoded: Encoded) -> None:
    index, side = encoded.parts["side_index"], encoded.parts["side_steps"]
    rows, cols = matrix(encoded.shape)
    if len(index) != len(side):
        raise AlignvecError(f"lossless names {len(index)} large steps and holds {len(side)}")
    if len(index) and (index[0] < 0 or index[-1] >= rows * cols or not (index[1:] > index[:-1]).all()):
        raise AlignvecError("lossless: the positions of large steps are not ascending positions of the tensor")
    if len(side) and (side.amin() < -0xFFFF or side.amax() > 0xFFFF):
        raise AlignvecError("lossless: a large step is larger than the range of 16-bit numbers")
