"""Embedding lookups, mixes of small parameters, and the row rule."""

import pytest
import torch

from alignvec.kernels import eager, reference
from tests.kernels.cases import BF16, DEVICE, FP16, FP32, assert_one_rounding


def _table(rows, k):
    table = torch.randn(8, k + 1, generator=torch.Generator().manual_seed(rows))
    columns = torch.arange(k, 0, -1, dtype=torch.int32)
    return columns.to(DEVICE), table.to(DEVICE), torch.tensor([rows], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("delta", [None, FP32], ids=["same", "delta_fp32"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_embedding(dtype, delta, rows):
    ids = torch.tensor([0, 16, 3, 3, 9, 1], device=DEVICE)
    weight = torch.randn(17, 33, device=DEVICE).to(dtype)
    deltas = (0.1 * torch.randn(3, 17, 33, device=DEVICE)).to(delta or dtype)
    args = (ids, weight, deltas, *_table(rows, 3))
    y = eager.embedding(*args)
    assert y.dtype == dtype
    assert_one_rounding(y, reference.embedding(*args))
    token_rows = torch.tensor([5, 0, 1, 7, 7, 2], dtype=torch.int32, device=DEVICE)
    assert_one_rounding(eager.embedding(*args, token_rows), reference.embedding(*args, token_rows))


@pytest.mark.parametrize("shape", [(33,), (4, 5), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_mix(dtype, shape):
    args = (torch.randn(shape, device=DEVICE).to(dtype), torch.randn(3, *shape, device=DEVICE).to(dtype), *_table(3, 3))
    y = eager.mix(*args, 6)
    assert y.shape == (6, *shape)
    assert y.dtype == FP32
    assert_one_rounding(y, reference.mix(*args, 6))


def test_rows_that_do_not_divide_give_nan():
    weight, deltas = torch.randn(17, 5, device=DEVICE), torch.randn(3, 17, 5, device=DEVICE)
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
    y = reference.linear(x, weight, bias, deltas, bias_deltas, columns, table, rows)
    for token in range(6):
        first, second = table[token // 2, 2].double(), table[token // 2, 1].double()
        merged = weight + first * deltas[0] + second * deltas[1]
        merged_bias = bias + first * bias_deltas[0] + second * bias_deltas[1]
        torch.testing.assert_close(y[token], merged @ x[token] + merged_bias)
