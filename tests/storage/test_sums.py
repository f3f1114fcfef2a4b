"""Both checksums of a tensor, streamed or at once, against digests computed value by value with numpy."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import alignvec
from alignvec.fingerprint import Checksum
from alignvec.sums import ROW, both_sums

EVERY = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
SIZES = [1, 4099, ROW, ROW + 1, (1 << 18) + 5, (1 << 20) - 3]


def digest(values: Tensor) -> str:
    """The checksum's definition, in numpy's unsigned words."""
    bits = values.view(torch.int16).numpy().view(np.uint16)
    words = np.zeros(-(-bits.size // ROW) * ROW, np.uint16)
    words[: bits.size] = bits
    table = words.view(np.uint64).reshape(-1, ROW // 4)
    found = hashlib.sha256(table.sum(1, dtype=np.uint64).tobytes())
    found.update(table.sum(0, dtype=np.uint64).tobytes())
    found.update(bits.size.to_bytes(8, "little"))
    return found.hexdigest()[:16]


def expected(values: Tensor) -> tuple[str, str]:
    if values.dtype == torch.float16:
        return digest(values.bfloat16()), digest(values.view(torch.bfloat16))
    narrow = (values if values.dtype == torch.float64 else values.float()).half().float().bfloat16()
    return digest(values.bfloat16()), digest(narrow)


def streamed(values: Tensor, step: int) -> tuple[str, str]:
    plain, narrow = Checksum(), Checksum()
    for start in range(0, values.numel(), step):
        one, other = both_sums(values[start : start + step])
        plain.add(one)
        narrow.add(other)
    return plain.hexdigest(), narrow.hexdigest()


def random_values(size: int, share: float, dtype: torch.dtype) -> Tensor:
    """Values as weights have them, some of any bits at all: subnormal, huge, infinite, NaN, -0.0."""
    generator = torch.Generator().manual_seed(size)
    values = (torch.randn(size, generator=generator) * 0.02).bfloat16()
    odd = torch.rand(size, generator=generator) < share
    values[odd] = EVERY[torch.randint(0, 1 << 16, (int(odd.sum()),), generator=generator)]
    if dtype != torch.bfloat16:
        values = values.nan_to_num(0.5)  # the bits of NaN are up to whoever converts it
    return values.to(dtype)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.03, 0.5])
@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_values_of_any_bits(size: int, share: float) -> None:
    values = random_values(size, share, torch.bfloat16)
    for step in (ROW, 3 * ROW, 1 << 20):
        assert streamed(values, step) == expected(values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, ROW + 1, (1 << 18) + 5])
def test_other_dtypes(size: int, dtype: torch.dtype) -> None:
    values = random_values(size, 0.01, dtype)
    if dtype != torch.float16:
        values += torch.randn(size, dtype=dtype) * 1e-5  # bits that bfloat16 does not hold
    assert streamed(values, ROW) == streamed(values, 1 << 20) == expected(values)


@pytest.mark.parametrize("kind", ["every value", "every value amid weights", "zeros", "minus zeros", "infinities"])
def test_every_value_that_there_is(kind: str) -> None:
    values = {
        "every value": EVERY,
        "every value amid weights": torch.cat([EVERY, torch.ones(1 << 20, dtype=torch.bfloat16)]),
        "zeros": torch.zeros(1 << 19, dtype=torch.bfloat16),
        "minus zeros": -torch.zeros(1 << 19, dtype=torch.bfloat16),
        "infinities": torch.full((1 << 19,), -torch.inf, dtype=torch.bfloat16),
    }[kind]
    assert streamed(values, ROW) == streamed(values, 1 << 20) == expected(values)


def test_values_that_do_not_lie_one_after_another_or_on_a_word() -> None:
    values = random_values(ROW * 2 + 6, 0.01, torch.bfloat16)
    assert streamed(values[::2], ROW) == expected(values[::2].clone())
    assert streamed(values[3:], ROW) == expected(values[3:].clone())


def test_a_row_that_was_padded_takes_no_more() -> None:
    whole, part = torch.ones(ROW, dtype=torch.bfloat16), torch.ones(5, dtype=torch.bfloat16)
    digest = Checksum().add(both_sums(part)[0])
    with pytest.raises(ValueError, match="fill their row"):
        digest.add(both_sums(whole)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_extract_writes_both(dtype: torch.dtype) -> None:
    base = nn.ParameterDict({"small": nn.Parameter(torch.randn(7)), "large": nn.Parameter(torch.randn(1100, 1000))})
    base = base.to(dtype).requires_grad_(False)
    base["large"] *= 1e-5
    tuned = nn.ParameterDict({name: nn.Parameter(value + 0.5) for name, value in base.items()}).to(dtype)
    vector = alignvec.extract(base, tuned)
    assert vector.base is not None
    for name, value in base.items():
        found = vector.base.tensors[name]
        assert (found.checksum, found.float16) == expected(value.detach().view(-1))
