"""Embedding lookups, mixes of small parameters, and the row rule."""

import pytest
import torch

from alignvec import formats, prepack
from alignvec.kernels import eager, operands, reference
from tests.kernels.cases import BF16, DEVICE, FORMATS, FP16, FP32, Case, assert_one_rounding


def _table(rows, k):
    table = torch.randn(8, k + 1, generator=torch.Generator().manual_seed(rows))
    columns = torch.arange(k, 0, -1, dtype=torch.int32)
    return columns.to(DEVICE), table.to(DEVICE), torch.tensor([rows], dtype=torch.int32, device=DEVICE)


def _dense(deltas):
    return [operands.dense(delta) for delta in deltas]


@pytest.mark.parametrize("rows", [1, 3, "random"])
@pytest.mark.parametrize("format", [*FORMATS, "mixed"])
def test_every_format(format, rows):
    """A lookup, a mix, and a mix written out, of operands of every kind."""
    case = Case(6, 40, 130, 9 if format == "mixed" else 2, rows=rows, format=format)
    _, weight, _, vectors, _, *coefficients = case.make()
    ids = torch.tensor([0, 16, 3, 3, 39, 20], device=DEVICE)
    args = (ids, weight, vectors, *coefficients)
    assert_one_rounding(eager.embedding(*args), reference.embedding(*args))
    if rows != "random":
        args = (weight, vectors, *coefficients[:3], 6)
        assert_one_rounding(eager.mix(*args), reference.mix(*args))
        out = torch.full_like(weight, torch.nan)
        eager.materialise(*args[:-1], out=out)
        coefficients[2].fill_(1)
        truth = reference.mix(weight, vectors, *coefficients[:3], 1)[0]
        # The mix is summed in float32, so that one weight in thousands rounds to the other neighbour.
        assert ((out.double() - truth).norm() / (truth.to(BF16).double() - truth).norm()).item() < 1.01


@pytest.mark.parametrize("width", [2, 4, 8])
def test_lossless_at_coefficient_one_is_the_checkpoint_bit_for_bit(width):
    """Zeros of both signs, steps of the side table and the lowest step, which marks one, included."""
    base = torch.randn(9, 70).bfloat16()
    base[0, :4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    aligned = (base + 0.01 * torch.randn(9, 70)).bfloat16()
    aligned[0, :4] = torch.tensor([-0.0, 0.0, 0.0, 1.0])
    encoded = formats.encode(f"lossless:width={width}", aligned.float() - base.float(), base, aligned=aligned)
    vector = prepack.operand(encoded, base, torch.device(DEVICE))
    out, base = torch.empty_like(base, device=DEVICE), base.to(DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    index = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    eager.materialise(base, [vector], index, one, index + 1, out=out)
    assert torch.equal(out.view(torch.int16).cpu(), aligned.view(torch.int16))
    assert torch.equal(operands.decode(vector, base).cpu(), aligned.float() - base.float().cpu())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("delta", [None, FP32], ids=["same", "delta_fp32"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_embedding(dtype, delta, rows):
    ids = torch.tensor([0, 16, 3, 3, 9, 1], device=DEVICE)
    weight = torch.randn(17, 33, device=DEVICE).to(dtype)
    args = (ids, weight, _dense((0.1 * torch.randn(3, 17, 33, device=DEVICE)).to(delta or dtype)), *_table(rows, 3))
    y = eager.embedding(*args)
    assert y.dtype == dtype
    assert_one_rounding(y, reference.embedding(*args))
    token_rows = torch.tensor([5, 0, 1, 7, 7, 2], dtype=torch.int32, device=DEVICE)
    assert_one_rounding(eager.embedding(*args, token_rows), reference.embedding(*args, token_rows))


@pytest.mark.parametrize("shape", [(33,), (4, 5), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_mix(dtype, shape):
    vectors = _dense(torch.randn(3, *shape, device=DEVICE).to(dtype).view(3, -1, shape[-1]))
    args = (torch.randn(shape, device=DEVICE).to(dtype), vectors, *_table(3, 3))
    y = eager.mix(*args, 6)
    assert y.shape == (6, *shape)
    assert y.dtype == FP32
    assert_one_rounding(y, reference.mix(*args, 6))


def test_rows_that_do_not_divide_give_nan():
    weight, deltas = torch.randn(17, 5, device=DEVICE), _dense(torch.randn(3, 17, 5, device=DEVICE))
    ids = torch.arange(10, device=DEVICE)
    assert eager.embedding(ids, weight, deltas, *_table(4, 3)).isnan().all()
    assert eager.mix(weight, deltas, *_table(4, 3), 10).isnan().all()


def test_row_rule():
    columns, table, rows = _table(3, 2)
    got = reference.token_coefficients(table, rows, columns, 6)
    assert torch.equal(got, table[[0, 0, 1, 1, 2, 2]][:, [2, 1]])
    token_rows = torch.tensor([7, 0], dtype=torch.int32, device=DEVICE)
    got = reference.token_coefficients(table, rows, columns, 2, token_rows)
    assert torch.equal(got, table[[7, 0]][:, [2, 1]])


def test_reference_is_the_merged_model():
    """The reference against weights merged by hand, row by row."""
    x, weight, bias = torch.randn(6, 7).double(), torch.randn(5, 7).double(), torch.randn(5).double()
    deltas, bias_deltas = torch.randn(2, 5, 7).double(), torch.randn(2, 5).double()
    columns, table, rows = (t.cpu() for t in _table(3, 2))
    y = reference.linear(x, weight, bias, _dense(deltas), bias_deltas, columns, table, rows)
    for token in range(6):
        first, second = table[token // 2, 2].double(), table[token // 2, 1].double()
        merged = weight + first * deltas[0] + second * deltas[1]
        merged_bias = bias + first * bias_deltas[0] + second * bias_deltas[1]
        torch.testing.assert_close(y[token], merged @ x[token] + merged_bias)
