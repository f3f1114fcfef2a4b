"""Lossless steps and checksum sums of csrc/cpu: the bits of plain torch, for every width, shape and pattern."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alignvec import AlignvecError, compiled, formats
from alignvec.compiled import cpu_lossless
from alignvec.formats import lossless, steps
from alignvec.sums import ROW, both_sums

pytestmark = pytest.mark.skipif(compiled.reason("cpu") is not None, reason="csrc/cpu is not built")
DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 7), (5, 1), (3, 31), (3, 33), (2, 511), (2, 512), (2, 513), (7, 1000), (1, 65536), (2, 65537)]


@pytest.fixture(autouse=True)
def live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_lossless, "_live", lambda: True)


def patterns(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any finite bits at all: subnormal numbers, both zeros, the largest."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator).to(torch.int16)
    values = bits.view(dtype)
    return torch.where(values.isfinite(), values, torch.zeros((), dtype=dtype))


def moved(base: Tensor, spread: int, seed: int) -> Tensor:
    """Values up to so many numbers away; beyond the ends of the numbers they are the base's own."""
    generator = torch.Generator().manual_seed(seed)
    far = torch.randint(-spread, spread + 1, base.shape, generator=generator)
    number = lossless.ordered(base).int() + far
    inside = (number >= -(1 << 15)) & (number < 1 << 15)
    values = lossless.ordered(number.to(torch.int16).view(base.dtype)).view(base.dtype)
    return torch.where(inside & values.isfinite(), values, base)


def pairs(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    base = patterns(shape, dtype, 1)
    changes = [
        base,
        patterns(shape, dtype, 2),
        -base,
        *(moved(base, spread, spread) for spread in (1, 3, 20, 150, 5000)),
    ]
    return [(base, aligned) for aligned in changes]


def same(one: Tensor, other: Tensor) -> bool:
    words = torch.uint8 if one.numel() else one.dtype
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(words), other.view(words))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fields_and_the_side_table_are_torch_s_and_lead_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for base, aligned in pairs(shape, dtype):
        for width in lossless.WIDTHS:
            made, truth = cpu_lossless.pack(base, aligned, width), steps.pack_in_torch(base, aligned, width)
            assert made.finite
            assert truth.finite
            for name in ("fields", "aside", "columns", "own"):
                assert same(getattr(made, name), getattr(truth, name)), (name, width)
            start = torch.cat([made.aside.new_zeros(1), made.aside]).cumsum(0).to(torch.int32)
            out = torch.empty_like(base)
            assert cpu_lossless.walk(base, width, made.fields, start, made.columns, made.own, out)
            assert same(out, aligned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (9, 100_003)], ids=str)
def test_counts_are_torch_s(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for base, aligned in pairs(shape, dtype):
        made, truth = cpu_lossless.count(base, aligned), steps.count_in_torch(base, aligned)
        assert made.changed == truth.changed == int((base.view(torch.int16) != aligned.view(torch.int16)).sum())
        assert torch.equal(made.far, truth.far)
        assert made.square == pytest.approx(truth.square, rel=1e-12)


def test_counts_by_hand() -> None:
    """1.0, and the numbers 1, 2, 4, -1, -2 and -3 away from it; 0.0 to -0.0 is a step of -1."""
    base = torch.ones(1, 7).bfloat16()
    base[0, 6] = 0.0
    number = lossless.ordered(base) + torch.tensor([1, 2, 4, -1, -2, -3, -1], dtype=torch.int16)
    aligned = lossless.ordered(number.view(torch.bfloat16)).view(torch.bfloat16)
    made = steps.count(base, aligned)
    assert made.changed == 7
    assert made.far.tolist() == [5, 3, 1, 0, 0, 0, 0, 0]  # of 1 bit: -1 and 0; of 2: to 1; of 3: to 3
    above, below = 2.0**-7, 2.0**-8
    assert made.square == above**2 * (1 + 4 + 16) + below**2 * (1 + 4 + 9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 40, 76])
def test_what_is_not_finite_is_noticed(place: int, dtype: torch.dtype, side: int, bad: float) -> None:
    pair = [torch.zeros(1, 77, dtype=dtype), torch.zeros(1, 77, dtype=dtype)]
    pair[side][0, place] = bad
    assert not torch.tensor(cpu_lossless.count(*pair).square).isfinite()
    assert not cpu_lossless.pack(*pair, 3).finite
    with pytest.raises(AlignvecError, match="w holds NaN or infinity"):
        formats.encode("lossless", torch.zeros(1, 77), pair[0], "w", aligned=pair[1])
    assert cpu_lossless.both_sums(pair[side].view(-1)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_that_leave_the_numbers_and_columns_that_are_none_are_refused(dtype: torch.dtype) -> None:
    base = torch.full((2, 70), torch.finfo(dtype).max, dtype=dtype)
    fields = torch.full((2, 70), 129, dtype=torch.uint8)  # one number up
    none, start = torch.empty(0, dtype=torch.int16), torch.zeros(3, dtype=torch.int32)
    arguments = (8, fields, start, none.view(torch.uint16), none, torch.empty_like(base))
    assert not cpu_lossless.walk(base, *arguments)
    assert not steps.walk_in_torch(base, *arguments)
    one = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([70], dtype=torch.uint16), torch.zeros(1).short()
    assert not cpu_lossless.walk(base * 0, 8, fields, *one, torch.empty_like(base))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 4099, ROW, ROW + 1, (1 << 18) + 5])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5])
def test_sums_are_torch_s(share: float, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(size)
    values = (torch.randn(size, generator=generator) * 0.02).to(dtype)
    odd = torch.rand(size, generator=generator) < share
    values[odd] = patterns((int(odd.sum()),), dtype, 3)
    made = cpu_lossless.both_sums(values)
    assert made is not None
    monkeypatch.setattr(cpu_lossless, "_live", lambda: False)
    for one, other in zip(made, both_sums(values), strict=True):
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.columns, other.columns)
        assert one.numel == other.numel == size


def test_every_finite_value_has_torch_s_float16() -> None:
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite()]
    for piece in values.split(97):  # few values a sum, so that no two mistakes make up for each other
        made = cpu_lossless.both_sums(piece)
        assert made is not None
        narrow = piece.float().half().float().bfloat16()
        expected = torch.zeros(ROW, dtype=torch.bfloat16)
        expected[: len(piece)] = narrow
        assert torch.equal(made[1].columns, expected.view(torch.int64))


def test_rows_and_sides_that_are_not_contiguous() -> None:
    base = patterns((60, 40), torch.bfloat16, 4)
    aligned = moved(base, 3, 5)
    made = steps.pack(base.T[3:], aligned.T[3:], 3)
    truth = steps.pack_in_torch(base.T[3:].contiguous(), aligned.T[3:].contiguous(), 3)
    assert all(same(one, other) for one, other in zip(made[:4], truth[:4], strict=True))


def test_sizes_are_checked() -> None:
    base, few = torch.zeros(4, 40).bfloat16(), torch.empty(0, dtype=torch.int16)
    fields, start, magnitude = torch.empty(4, 15, dtype=torch.uint8), torch.zeros(5).int(), torch.empty(1).int()
    operators = torch.ops.alignvec
    with pytest.raises(RuntimeError, match="own: there must be room for all"):
        operators.cpu_pack_steps(base, base, 3, fields, start, few, few, magnitude)
    with pytest.raises(RuntimeError, match="fields: it must be contiguous, 60 items"):
        operators.cpu_unpack_steps(base, 3, fields[1:], start, few, few, base.clone(), magnitude)
    with pytest.raises(RuntimeError, match="start: rows must begin at 0"):
        operators.cpu_unpack_steps(base, 3, fields, start + 1, few, few, base.clone(), magnitude)
    with pytest.raises(RuntimeError, match="aligned: it must be contiguous, 160 items"):
        operators.cpu_count_steps(base, base[1:], torch.zeros(9).long(), torch.zeros(1).double())
