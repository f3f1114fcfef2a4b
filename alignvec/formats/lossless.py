"""lossless: how many representable numbers lie between the base's 16-bit weight and the aligned one.

    ordered(h) = h ^ ((h >> 15) & 0x7FFF)    of the int16 bits h: neighbouring numbers become neighbouring integers
    step       = ordered(aligned) - ordered(base)

Steps are `width`-bit fields, offset binary, 2 to 8 bits: as many as make the fewest bytes. Steps out of a field's
range, -2^(width-1) to 2^(width-1) - 1, have a field that says 0 and the aligned weight's own bits in a side table: 4
bytes each (6 in rows of more than 65536), listed by row and column, and 4 bytes a row for where its entries begin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.formats import bits
from alignvec.formats import steps as steps_between
from alignvec.formats.spec import Encoded, Option, Spec, blocks, finite, matrix, span
from alignvec.formats.steps import beyond as beyond
from alignvec.formats.steps import columns_dtype, side, walk
from alignvec.formats.steps import ordered as ordered

OPTIONS: dict[str, Option] = {"width": 0, "dtype": ""}  # 0: the width that takes fewest bytes; dtype: the base's
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_ASIDE = 2**31 - 1
PARTS = ("steps", "side_start", "side_columns", "side_bits")


def validate(spec: Spec) -> None:
    if spec.options["width"] not in (0, *WIDTHS):
        raise AlignvecError(f"format lossless: width={spec.options['width']} must be 2 to 8, or 0 for the fewest bytes")
    if spec.options["dtype"] not in ("", *DTYPES):
        raise AlignvecError(f"format lossless: dtype={spec.options['dtype']} must be bfloat16 or float16")


def encode(spec: Spec, delta: Tensor, base: Tensor | None, aligned: Tensor | None, name: str) -> Encoded:
    """Needs `base`; without `aligned` that is base + delta, and delta has to be their difference exactly."""
    before, after = _pair(delta, base, aligned, name)
    width = int(spec.options["width"]) or narrowest(_far(before, after, name), *before.shape)
    return packed(before, after, width, tuple(delta.shape), name)


def packed(base: Tensor, aligned: Tensor, width: int, shape: tuple[int, ...], name: str) -> Encoded:
    """The steps between matrices of one 16-bit dtype, in this width, as a parameter of this shape.

    Raises AlignvecError for NaN and infinity.
    """
    made = steps_between.pack(base, aligned, width)
    if not made.finite:
        raise _not_finite(name)
    options: dict[str, Option] = {"width": width, "dtype": str(base.dtype).removeprefix("torch.")}
    parts = {
        "steps": made.fields,
        "side_start": _starts(made.aside, name),
        "side_columns": made.columns,
        "side_bits": made.own,
    }
    return Encoded("lossless", shape, options, parts)


def far(delta: Tensor | None, base: Tensor | None, aligned: Tensor | None, name: str) -> Tensor:
    """How many steps do not fit fields of 1, 2, ... 8 bits: int64 [8]. Of `delta` and `aligned` one is enough."""
    return _far(*_pair(delta, base, aligned, name), name)


def _far(base: Tensor, aligned: Tensor, name: str) -> Tensor:
    counted = steps_between.count(base, aligned)
    if not math.isfinite(counted.square):  # differences beyond float32 are none of lossless's business
        for block in blocks(*base.shape):
            if not (finite(base[block]) and finite(aligned[block])):
                raise _not_finite(name)
    return counted.far


def narrowest(far: Tensor, rows: int, cols: int) -> int:
    """The width that takes the fewest bytes where `far` says how many steps do not fit fields of 1 to 8 bits."""
    aside, counts = columns_dtype(cols).itemsize + 2, far.tolist()
    return min(WIDTHS, key=lambda width: rows * bits.row_bytes(cols, width) + aside * counts[width - 1])


def nbytes(far: Tensor, rows: int, cols: int) -> int:
    """Bytes of a tensor in that width."""
    width = narrowest(far, rows, cols)
    aside = columns_dtype(cols).itemsize + 2
    return rows * bits.row_bytes(cols, width) + aside * int(far[width - 1]) + 4 * (rows + 1)


def joined(sides: Mapping[str, Sequence[Tensor]], name: str) -> dict[str, Tensor]:
    """The side table of a tensor from those of its rows, in their order, encoded in the same width."""
    count = torch.cat([start.diff() for start in sides["side_start"]])
    return {"side_start": _starts(count, name)} | {
        part: torch.cat(list(sides[part])) for part in ("side_columns", "side_bits")
    }


def _starts(count: Tensor, name: str) -> Tensor:
    """Where the side table's entries of each row begin, and where the last ones end, from how many each row has."""
    start = torch.cat([count.new_zeros(1), count]).cumsum(0, dtype=torch.int64)
    if int(start[-1]) > MOST_ASIDE:
        raise AlignvecError(f"{name} has too many large steps for lossless: choose another format")
    return start.to(torch.int32)


def _pair(delta: Tensor | None, base: Tensor | None, aligned: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """The base and the aligned tensor as matrices."""
    if base is None:
        raise AlignvecError(f"format lossless needs the base's values of {name}")
    for tensor in (base,) if aligned is None else (base, aligned):
        if tensor.dtype != base.dtype or not takes(tensor.dtype):
            raise AlignvecError(
                f"{name} is {tensor.dtype}: lossless stores pairs of bfloat16, or of float16, checkpoints"
            )
    size = matrix(tuple(base.shape))
    base = base.reshape(size)
    if aligned is not None:
        return base, aligned.reshape(size)
    assert delta is not None
    return base, _sum(base, delta.reshape(size), name)


def _sum(base: Tensor, delta: Tensor, name: str) -> Tensor:
    out = torch.empty_like(base)
    for block in blocks(*base.shape):
        aligned = torch.add(base[block].double(), delta[block].double()).to(base.dtype)
        if not torch.equal(aligned.float() - base[block].float(), delta[block].float()):
            raise AlignvecError(
                f"delta {name} is no difference of two {base.dtype} tensors, which is what lossless stores: "
                "choose another format"
            )
        out[block] = aligned
    return out


def takes(dtype: torch.dtype) -> bool:
    """Whether steps are counted between values of this dtype."""
    return dtype in DTYPES.values()


def _not_finite(name: str) -> AlignvecError:
    return AlignvecError(f"{name} holds NaN or infinity in the base or the aligned checkpoint")


def steps(base: Tensor, aligned: Tensor) -> Tensor:
    """int32: from base to aligned, of one 16-bit dtype."""
    return ordered(aligned).to(torch.int32) - ordered(base)


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
    out = torch.empty(stop - start, cols, dtype=dtype, device=base.device)
    fields, begins, columns, own = (encoded.parts[part] for part in PARTS)
    base = base.reshape(stop - start, cols)
    if not walk(base, width, fields[start:stop], begins[start : stop + 1], columns, own, out):
        raise AlignvecError("a lossless delta leads out of the numbers' range: it was encoded against a different base")
    return out.view(encoded.shape) if rows is None else out


def decode(encoded: Encoded, base: Tensor | None, rows: slice | None) -> Tensor:
    """float32(aligned) - float32(base), [n, cols]."""
    count, cols = matrix(encoded.shape)
    start, stop = span(rows, count)
    if base is None:
        raise AlignvecError("a lossless delta can be read with its base's values only: load it with the base")
    base = base.reshape(-1, cols)
    return apply(encoded, base, slice(start, stop)).float().sub_(base)


def layout(spec: Spec, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int | None, ...]]]:
    (rows, cols), width = matrix(shape), int(spec.options["width"])
    if not width or not spec.options["dtype"]:
        raise AlignvecError("an encoded lossless tensor has a width and a dtype")
    return {
        "steps": (torch.uint8, (rows, bits.row_bytes(cols, width))),
        "side_start": (torch.int32, (rows + 1,)),
        "side_columns": (columns_dtype(cols), (None,)),
        "side_bits": (torch.int16, (None,)),
    }


def check(encoded: Encoded) -> None:
    (rows, cols), width = matrix(encoded.shape), int(encoded.options["width"])
    start, columns, own = (encoded.parts[f"side_{part}"] for part in ("start", "columns", "bits"))
    if len(columns) != len(own):
        raise AlignvecError(f"lossless names {len(columns)} large steps and holds {len(own)}")
    if start[0] != 0 or start[-1] != len(own) or (start[1:] < start[:-1]).any():
        raise AlignvecError("lossless: the rows' beginnings in the side table are not ascending positions of it")
    if not finite(own.view(DTYPES[str(encoded.options["dtype"])])):
        raise AlignvecError("lossless: the side table holds NaN or infinity")
    for block in blocks(rows, cols):
        row, column, _ = side(start[block.start : block.stop + 1], columns, own)
        place = row * cols + column
        if (column < 0).any() or (column >= cols).any() or (place[1:] <= place[:-1]).any():
            raise AlignvecError("lossless: the columns of large steps are not ascending columns of a row")
        packed = encoded.parts["steps"][block]
        at, last = column * width // 8, packed.shape[1] - 1
        two = packed[row, at].int() | packed[row, (at + 1).clamp(max=last)].int() << 8
        if ((two >> (column * width % 8)) % (1 << width) != 1 << (width - 1)).any():
            raise AlignvecError("lossless: a weight has a large step and a small one")
