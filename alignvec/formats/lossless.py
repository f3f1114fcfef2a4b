"""lossless: how many representable numbers lie between the base's 16-bit weight and the aligned one.

    ordered(h) = h ^ ((h >> 15) & 0x7FFF)    of the int16 bits h: neighbouring numbers become neighbouring integers
    step       = ordered(aligned) - ordered(base)

Steps are `width`-bit fields, offset binary, 2 to 8 bits: as many as make the fewest bytes. Steps out of a field's
range, -2^(width-1) to 2^(width-1) - 1, have a field that says 0 and the aligned weight's own bits in a side table: 4
bytes each (6 in rows of more than 65536), listed by row and column, and 4 bytes a row for where its entries begin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.formats import bits
from alignvec.formats.spec import Encoded, Option, Spec, blocks, finite, matrix, span

OPTIONS: dict[str, Option] = {"width": 0, "dtype": ""}  # 0: the width that takes fewest bytes; dtype: the base's
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_ASIDE = 2**31 - 1


def validate(spec: Spec) -> None:
    if spec.options["width"] not in (0, *WIDTHS):
        raise AlignvecError(f"format lossless: width={spec.options['width']} must be 2 to 8, or 0 for the fewest bytes")
    if spec.options["dtype"] not in ("", *DTYPES):
        raise AlignvecError(f"format lossless: dtype={spec.options['dtype']} must be bfloat16 or float16")


def encode(spec: Spec, delta: Tensor, base: Tensor | None, aligned: Tensor | None, name: str) -> Encoded:
    """Needs `base`; without `aligned` that is base + delta, and delta has to be their difference exactly."""
    pair, shape = _pair(delta, base, aligned, name), tuple(delta.shape)
    rows, cols = matrix(shape)
    width = int(spec.options["width"]) or narrowest(pair.far(), rows, cols)
    options: dict[str, Option] = {"width": width, "dtype": str(pair.base.dtype).removeprefix("torch.")}
    half = 1 << (width - 1)
    packed = torch.empty(rows, bits.row_bytes(cols, width), dtype=torch.uint8, device=delta.device)
    count = torch.zeros(rows, dtype=torch.int64, device=delta.device)
    columns, own = [], []
    for block, aligned, step in pair:
        where = (_reach(step) >= half).view(-1).nonzero().view(-1)
        count[block] = torch.bincount(where // cols, minlength=len(step))
        columns.append((where % cols).to(_columns(cols)))
        own.append(aligned.view(torch.int16).view(-1)[where])
        step.view(-1)[where] = 0
        packed[block] = bits.pack(step.add_(half).to(torch.uint8), width)
    side = {"side_start": _starts(count, name), "side_columns": torch.cat(columns), "side_bits": torch.cat(own)}
    return Encoded("lossless", shape, options, {"steps": packed, **side})


def far(delta: Tensor | None, base: Tensor | None, aligned: Tensor | None, name: str) -> Tensor:
    """How many steps do not fit fields of 1, 2, ... 8 bits: int64 [8]. Of `delta` and `aligned` one is enough."""
    return _pair(delta, base, aligned, name).far()


def narrowest(far: Tensor, rows: int, cols: int) -> int:
    """The width that takes the fewest bytes where `far` says how many steps do not fit fields of 1 to 8 bits."""
    aside, counts = _columns(cols).itemsize + 2, far.tolist()
    return min(WIDTHS, key=lambda width: rows * bits.row_bytes(cols, width) + aside * counts[width - 1])


def nbytes(far: Tensor, rows: int, cols: int) -> int:
    """Bytes of a tensor in that width."""
    width = narrowest(far, rows, cols)
    aside = _columns(cols).itemsize + 2
    return rows * bits.row_bytes(cols, width) + aside * int(far[width - 1]) + 4 * (rows + 1)


def joined(side: Mapping[str, Sequence[Tensor]], name: str) -> dict[str, Tensor]:
    """The side table of a tensor from those of its rows, in their order, encoded in the same width."""
    count = torch.cat([start.diff() for start in side["side_start"]])
    return {"side_start": _starts(count, name)} | {
        part: torch.cat(list(side[part])) for part in ("side_columns", "side_bits")
    }


def _starts(count: Tensor, name: str) -> Tensor:
    """Where the side table's entries of each row begin, and where the last ones end, from how many each row has."""
    start = torch.cat([count.new_zeros(1), count]).cumsum(0, dtype=torch.int64)
    if int(start[-1]) > MOST_ASIDE:
        raise AlignvecError(f"{name} has too many large steps for lossless: choose another format")
    return start.to(torch.int32)


class _Pair:
    """The aligned weights and the steps to them, int16, some rows at a time; iterating again computes them again.

    A step beyond int16 wraps and stays a large one: from the lowest number to the largest it is less than 2^16 - 256.
    """

    def __init__(self, delta: Tensor | None, aligned: Tensor | None, base: Tensor, name: str) -> None:
        self.delta, self.aligned, self.base, self.name = delta, aligned, base, name

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for block in blocks(*self.base.shape):
            aligned = self._sum(block) if self.aligned is None else self.aligned[block].contiguous()
            before, after = ordered(self.base[block]), ordered(aligned)
            if not (_numbers(before, aligned.dtype) and _numbers(after, aligned.dtype)):
                raise AlignvecError(f"{self.name} holds NaN or infinity in the base or the aligned checkpoint")
            yield block, aligned, after.sub_(before)

    def far(self) -> Tensor:
        return torch.stack([beyond(_reach(step)) for _, _, step in self]).sum(0)

    def _sum(self, block: slice) -> Tensor:
        assert self.delta is not None
        base, delta = self.base[block], self.delta[block]
        aligned = (base.double() + delta.double()).to(base.dtype)
        if not torch.equal(aligned.float() - base.float(), delta.float()):
            raise AlignvecError(
                f"delta {self.name} is no difference of two {base.dtype} tensors, which is what lossless stores: "
                "choose another format"
            )
        return aligned.contiguous()


def _pair(delta: Tensor | None, base: Tensor | None, aligned: Tensor | None, name: str) -> _Pair:
    if base is None:
        raise AlignvecError(f"format lossless needs the base's values of {name}")
    for tensor in (base,) if aligned is None else (base, aligned):
        if tensor.dtype != base.dtype or tensor.dtype not in DTYPES.values():
            raise AlignvecError(
                f"{name} is {tensor.dtype}: lossless stores pairs of bfloat16, or of float16, checkpoints"
            )
    size = matrix(tuple(base.shape))
    delta, aligned = (None if tensor is None else tensor.reshape(size) for tensor in (delta, aligned))
    return _Pair(delta, aligned, base.reshape(size), name)


def _reach(step: Tensor) -> Tensor:
    """step, or -1 - step of a negative one: below 2^(width-1) where a field of `width` bits holds the step."""
    return step ^ (step >> 15)


def beyond(reach: Tensor) -> Tensor:
    """How many of some integers >= 0 are at least 1, 2, 4, ... 128: int32 [8]."""
    return torch.stack([(reach >> place).clamp_(max=1).sum(dtype=torch.int32) for place in range(8)])


def _numbers(order: Tensor, dtype: torch.dtype) -> bool:
    """Whether the numbers of this order (`ordered`, int16) are all finite."""
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16).item()
    lowest, highest = (int(end) for end in order.aminmax())
    return -largest - 1 <= lowest and highest <= largest


def _columns(cols: int) -> torch.dtype:
    return torch.uint16 if cols <= 1 << 16 else torch.int32


def steps(base: Tensor, aligned: Tensor) -> Tensor:
    """int32: from base to aligned, of one 16-bit dtype."""
    return ordered(aligned).to(torch.int32) - ordered(base)


def ordered(values: Tensor) -> Tensor:
    """The bits of 16-bit floats as int16 in the order of the numbers; -0.0 comes right before 0.0."""
    h = values.contiguous().view(torch.int16)
    order = h >> 15
    order &= 0x7FFF
    order ^= h
    return order


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
    base = base.reshape(stop - start, cols)
    for block in blocks(stop - start, cols):
        own = slice(start + block.start, start + block.stop)
        number = ordered(base[block])
        if number.numel():
            known = _numbers(number, dtype)  # then no step that a field holds leaves int16
            number += bits.unpack(encoded.parts["steps"][own], width, cols)
            number -= 1 << (width - 1)
            if not (known and _numbers(number, dtype)):
                raise AlignvecError(
                    "a lossless delta leads out of the numbers' range: it was encoded against a different base"
                )
        h = ordered(number)
        row, column, aside = _side(encoded, own)
        h[row, column] = aside
        out[block] = h.view(dtype)
    return out.view(encoded.shape) if rows is None else out


def _side(encoded: Encoded, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Row (among `rows`), column and bits of the side table's entries there: int64, int64, int16."""
    start = encoded.parts["side_start"][rows.start : rows.stop + 1]
    own = slice(*start[[0, -1]].tolist())
    row = torch.arange(len(start) - 1, device=start.device).repeat_interleave(start.diff())
    return row, encoded.parts["side_columns"][own].to(torch.int64), encoded.parts["side_bits"][own]


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
        "side_columns": (_columns(cols), (None,)),
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
        row, column, _ = _side(encoded, block)
        place = row * cols + column
        if (column < 0).any() or (column >= cols).any() or (place[1:] <= place[:-1]).any():
            raise AlignvecError("lossless: the columns of large steps are not ascending columns of a row")
        packed = encoded.parts["steps"][block]
        at, last = column * width // 8, packed.shape[1] - 1
        two = packed[row, at].int() | packed[row, (at + 1).clamp(max=last)].int() << 8
        if ((two >> (column * width % 8)) % (1 << width) != 1 << (width - 1)).any():
            raise AlignvecError("lossless: a weight has a large step and a small one")
