"""The interpreter's bfloat16, as patched, against torch's; on a GPU the same of the compiler's."""

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.cases import BF16, DEVICE, FP16, FP32


@triton.jit
def _convert(x_ptr, y_ptr, size: tl.constexpr):
    offs = tl.arange(0, size)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def _arithmetic(a_ptr, b_ptr, sum_ptr, product_ptr, less_ptr, size: tl.constexpr):
    offs = tl.arange(0, size)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    tl.store(sum_ptr + offs, a + b)
    tl.store(product_ptr + offs, -a * b)
    tl.store(less_ptr + offs, (a < b).to(tl.int32))


@triton.jit
def _dot(a_ptr, b_ptr, y_ptr, size: tl.constexpr):
    offs = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    tl.store(y_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs)))


def _values(seed):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(256, generator=g) * torch.exp2(torch.randint(-20, 20, (256,), generator=g))).to(DEVICE)


@pytest.mark.parametrize("source", [FP32, FP16, BF16, torch.int32], ids=str)
def test_rounds_to_nearest_even(source):
    x = _values(0).clamp(-60000, 60000).to(source)
    if source == FP32:
        ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), -float("inf"), -0.0], device=DEVICE)
        x[: len(ties)] = ties
    y = torch.zeros(256, dtype=BF16, device=DEVICE)
    _convert[(1,)](x, y, 256)
    assert torch.equal(y, x.to(BF16))


@pytest.mark.parametrize("target", [FP32, FP16, torch.int32], ids=str)
def test_converts_values_not_bits(target):
    x = _values(1).clamp(-60000, 60000).to(BF16)
    y = torch.zeros(256, dtype=target, device=DEVICE)
    _convert[(1,)](x, y, 256)
    assert torch.equal(y, x.to(target))


def test_nan_stays():
    y = torch.zeros(16, dtype=BF16, device=DEVICE)
    _convert[(1,)](torch.full((16,), float("nan"), device=DEVICE), y, 16)
    assert y.isnan().all()


def test_arithmetic():
    a, b = _values(2).to(BF16), _values(3).to(BF16)
    total, product = torch.zeros_like(a), torch.zeros_like(a)
    less = torch.zeros(256, dtype=torch.int32, device=DEVICE)
    _arithmetic[(1,)](a, b, total, product, less, 256)
    assert torch.equal(total, a + b)
    assert torch.equal(product, -a * b)
    assert torch.equal(less.bool(), a < b)


def test_dot():
    a, b = _values(4).view(16, 16).sign().to(BF16), _values(5).view(16, 16).to(BF16)
    y = torch.zeros(16, 16, device=DEVICE)
    _dot[(1,)](a, b, y, 16)
    torch.testing.assert_close(y, (a.double() @ b.double()).float(), rtol=1e-6, atol=1e-2)
