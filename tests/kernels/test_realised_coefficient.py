"""The precision promise: a coefficient is realised within 1e-3, for deltas near one bfloat16 ULP."""

import pytest
import torch

from alignvec.kernels import operands
from tests.kernels.cases import BF16, DEVICE, FP16, FP32, implementation

REQUESTED = (-1.3, -0.6, -0.1, 0.1, 0.4, 0.7, 1.0, 1.3)
EXACT = ("torch-split", "torch-combine", "triton-split", "triton-combine")


def _operands(dtype, ulps, scattered):
    """x, weight, delta: the base cancels in x W^T, so that the output holds the edit alone, at full precision.

    Columns 2j and 2j + 1 of the weight are equal and those of x opposite. The delta is `ulps` bfloat16 ULPs of its
    weight, up or down: all of it exactly (where rounding errors are alike and add up), or `scattered` about that size.
    """
    g = torch.Generator().manual_seed(2)
    half = torch.randn(64, 384, generator=g, dtype=FP32) * 0.02
    weight = half.to(BF16).to(dtype).repeat_interleave(2, dim=1)
    ulp = torch.exp2(weight.float().abs().log2().floor() - 7)
    size = torch.randn(weight.shape, generator=g) if scattered else torch.randn(weight.shape, generator=g).sign()
    delta = (ulps * ulp * size).to(dtype)
    x = torch.randn(16, 384, generator=g).to(dtype)
    x = torch.stack([x, -x], dim=2).flatten(1)
    return x.to(DEVICE), weight.to(DEVICE), delta.to(DEVICE)


def _realised(run, x, weight, delta, requested, precision="exact"):
    """Projections of the realised edits on the vector. A second vector stands by at zero, so that combine combines."""
    columns = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    rows = torch.ones(1, dtype=torch.int32, device=DEVICE)
    deltas = [operands.dense(delta), operands.dense(delta.flip(0))]
    edit = x.double() @ delta.double().t()
    for c in requested:
        table = torch.tensor([[c, 0.0]], device=DEVICE)
        y = run(x, weight, None, deltas, None, columns, table, rows, precision=precision).double()
        yield ((y * edit).sum() / (edit * edit).sum()).item()


@pytest.mark.parametrize("scattered", [False, True], ids=["alike", "scattered"])
@pytest.mark.parametrize("ulps", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", EXACT)
def test_exact_realises_the_coefficient(name, dtype, ulps, scattered):
    operands = _operands(dtype, ulps, scattered)
    for requested, realised in zip(REQUESTED, _realised(implementation(name), *operands, REQUESTED), strict=True):
        assert abs(realised - requested) < 1e-3, f"{requested} became {realised}"


@pytest.mark.parametrize("name", ["torch-combine", "triton-combine"])
def test_merged_does_not(name):
    operands = _operands(BF16, 1.0, False)
    realised = dict(zip((0.4, 0.6), _realised(implementation(name), *operands, (0.4, 0.6), "merged"), strict=True))
    assert realised[0.4] < 0.1
    assert realised[0.6] > 0.9


def test_naive_storage_is_what_the_measure_catches():
    """The measure itself: an exact merge in float64 passes, a bfloat16 one is off by up to 0.4."""
    x, weight, delta = _operands(BF16, 1.0, False)
    edit = x.double() @ delta.double().t()
    for c, expected in ((0.4, 0.0), (0.6, 1.0)):
        stored = (weight.double() + c * delta.double()).to(BF16).double()
        for mix, target in ((weight.double() + c * delta.double(), c), (stored, expected)):
            assert abs(((x.double() @ mix.t()) * edit).sum() / (edit * edit).sum() - target) < 0.02
