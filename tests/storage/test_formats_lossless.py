"""The lossless format: the aligned checkpoint's bits come back, whatever the steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignvec import formats, prepack
from alignvec.errors import AlignvecError
from alignvec.formats import lossless
from alignvec.kernels import operands

DTYPES = [torch.bfloat16, torch.float16]
WIDTHS = [0, 2, 3, 4, 5, 6, 7, 8]


def every_finite(dtype: torch.dtype) -> Tensor:
    """Each finite 16-bit pattern once, in the order of the integers: subnormals, both zeros, the largest numbers."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return patterns[torch.isfinite(patterns.float())]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ordered_numbers_are_ordered_and_the_function_is_its_own_inverse(dtype: torch.dtype) -> None:
    values = every_finite(dtype)
    numbers = lossless.ordered(values).int()
    rising = values[numbers.argsort()].float()
    assert (rising[1:] >= rising[:-1]).all()
    assert torch.equal(numbers.sort().values.diff(), torch.ones(len(numbers) - 1, dtype=torch.int32))
    assert same_bits(lossless.ordered(lossless.ordered(values).view(dtype)).view(dtype), values)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [0, 1, -1, 2, -2, 7, 8, -8, -9, 127, 128, -128, -129, 5000, 40000, -60000])
def test_every_pattern_takes_every_kind_of_step(step: int, dtype: torch.dtype, width: int) -> None:
    base = every_finite(dtype)
    base = base[lossless.ordered(base).argsort()]
    aligned = base.roll(-step)  # a step of that size for most, a very large one of the other sign round the end
    columns = 97
    rows = len(base) // columns
    base, aligned = (t[: rows * columns].view(rows, columns).contiguous() for t in (base, aligned))
    delta = aligned.float() - base.float()
    encoded = formats.encode(f"lossless:width={width}", torch.zeros_like(delta), base, "w", aligned=aligned)
    formats.check(encoded)
    assert same_bits(lossless.apply(encoded, base), aligned)
    assert torch.equal(formats.decode(encoded, base), delta)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shuffled_patterns_come_back_row_by_row(dtype: torch.dtype) -> None:
    values = every_finite(dtype)
    base, aligned = (values[torch.randperm(len(values))][:60000].view(20, 10, 300) for _ in range(2))
    encoded = formats.encode("lossless", torch.zeros(base.shape), base, aligned=aligned)
    assert encoded.options["dtype"] == str(dtype).removeprefix("torch.")
    assert same_bits(lossless.apply(encoded, base), aligned)
    rows = slice(37, 111)
    part = lossless.apply(encoded, base.view(200, 300)[rows], rows)
    assert same_bits(part, aligned.view(200, 300)[rows])


@pytest.mark.parametrize("spread", [1e-5, 1e-4, 1e-3])
def test_an_exact_difference_is_enough_and_the_cheapest_width_is_chosen(spread: float) -> None:
    base = (torch.randn(64, 200) * 0.02).bfloat16()
    aligned = (base.float() + torch.randn(64, 200) * spread).bfloat16()
    delta = aligned.float() - base.float()
    auto, *forced = (formats.encode(f"lossless:width={width}", delta, base) for width in WIDTHS)
    assert same_bits(lossless.apply(auto, base), aligned)
    assert auto.nbytes == min(encoded.nbytes for encoded in forced)
    assert torch.equal(formats.decode(auto, base), delta)


def test_a_nearly_unchanged_tensor_takes_a_quarter_of_a_byte_a_weight() -> None:
    base = (torch.rand(128, 256) + 1).bfloat16()
    changed = torch.rand(128, 256) < 0.2
    aligned = torch.where(changed, lossless.ordered(base) - 1, lossless.ordered(base)).view(torch.bfloat16)
    encoded = formats.encode("lossless", aligned.float() - base.float(), base)
    assert encoded.options["width"] == 2
    assert encoded.nbytes == base.numel() // 4 + 129 * 4  # and where each row's part of the empty side table begins


@pytest.mark.parametrize("columns", [65536, 65537])
def test_the_side_table_reaches_the_last_column_of_wide_rows(columns: int) -> None:
    base, delta = torch.ones(3, columns).bfloat16(), torch.zeros(3, columns)
    for row, column in [(0, 0), (0, columns - 1), (2, 32768), (2, columns - 2), (2, columns - 1)]:
        delta[row, column] = -3.0
    encoded = formats.encode("lossless", delta, base)
    formats.check(encoded)
    assert encoded.options["width"] == 2
    assert encoded.parts["side_start"].tolist() == [0, 2, 2, 5]
    assert encoded.nbytes == 3 * -(-columns // 4) + 4 * 4 + 5 * (4 if columns == 65536 else 6)
    assert torch.equal(formats.decode(encoded, base), delta)
    assert torch.equal(formats.decode(encoded, base[2:], slice(2, 3)), delta[2:])


@pytest.mark.parametrize("share", [0.5, 0.02, 0.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_operand_has_the_bits_that_take_the_fewest_bytes(width: int, share: float) -> None:
    """Whatever the file's width: steps of +-1, a share of up to 8, and a few to the ends of the numbers and to 0."""
    base = torch.randn(33, 300).bfloat16()
    step = torch.randint(-1, 2, base.shape)
    step = torch.where(torch.rand(base.shape) < share, torch.randint(-8, 8, base.shape), step)
    aligned = lossless.ordered((lossless.ordered(base).int() + step).to(torch.int16).view(base.dtype)).view(base.dtype)
    aligned[5, :4] = torch.tensor([3e38, -3e38, 0.0, 2**-10])
    encoded = formats.encode(f"lossless:width={width}", base * 0, base, aligned=aligned)
    operand = prepack.operand(encoded, base, torch.device("cpu"))
    assert operand.bits == (4 if share == 0.5 else 2)
    assert same_bits(operands.aligned(operand, base), aligned)
    assert torch.equal(operands.decode(operand, base), aligned.float() - base.float())


def test_only_the_aligned_tensor_tells_a_negative_zero() -> None:
    base, aligned = torch.zeros(2, 3).bfloat16(), -torch.zeros(2, 3).bfloat16()
    delta = aligned.float() - base.float()
    assert same_bits(lossless.apply(formats.encode("lossless", delta, base, aligned=aligned), base), aligned)
    assert same_bits(lossless.apply(formats.encode("lossless", delta, base), base), base)


def test_what_is_no_pair_of_16_bit_tensors_is_refused() -> None:
    base = torch.randn(3, 5).bfloat16()
    cases = [
        (dict(delta=torch.full((3, 5), 1e-3), base=base), "w is no difference of two"),
        (dict(delta=torch.zeros(3, 5)), "needs the base's values of w"),
        (dict(delta=torch.zeros(3, 5), base=base.float()), "w is torch.float32"),
        (dict(delta=torch.zeros(3, 5), base=base, aligned=base.half()), "w is torch.float16"),
    ]
    for arguments, message in cases:
        with pytest.raises(AlignvecError, match=message):
            formats.encode("lossless", name="w", **arguments)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["base", "aligned"])
def test_not_finite_is_refused(side: str, bad: float) -> None:
    tensors = {"base": torch.zeros(2, 40).bfloat16(), "aligned": torch.zeros(2, 40).bfloat16()}
    tensors[side][1, 39] = bad
    with pytest.raises(AlignvecError, match="w holds NaN or infinity"):
        formats.encode("lossless", torch.zeros(2, 40), name="w", **tensors)


def test_reading_needs_the_base_it_was_encoded_against() -> None:
    base = torch.full((4, 9), 1.0).bfloat16()
    aligned = base * 1.5e38
    encoded = formats.encode("lossless", aligned.float() - base.float(), base)
    with pytest.raises(AlignvecError, match="with its base's values only"):
        formats.decode(encoded)
    with pytest.raises(AlignvecError, match="bfloat16 base"):
        formats.decode(encoded, base.float())
    with pytest.raises(AlignvecError, match="base"):
        lossless.apply(encoded, base[:2])
    stepped = formats.encode("lossless", base * 0, base, aligned=lossless.ordered(base).add(1).view(torch.bfloat16))
    with pytest.raises(AlignvecError, match="against a different base"):
        formats.decode(stepped, base * torch.finfo(torch.bfloat16).max)
