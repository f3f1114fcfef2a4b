"""The embedding in Triton against float64 lookups of decoded deltas."""

import pytest
import torch

from alignvec.errors import AlignvecError
from alignvec.kernels import operands, reference
from alignvec.kernels.embedding import embedding
from tests.kernels.cases import BF16, DEVICE, FORMATS, FP16, FP32, Case, assert_one_rounding

IDS = [0, 16, 3, 3, 9, 1]


def _truth(ids, weight, vectors, columns, table, rows, token_rows=None):
    c = reference.token_coefficients(table, rows, columns, ids.shape[0], token_rows).double()
    y = weight[ids].double()
    for i, vector in enumerate(vectors):
        y = y + c[:, i, None] * operands.decode(vector, weight)[ids].double()
    return y


def _make(case):
    _, weight, _, vectors, _, *rest = case.make()
    return torch.tensor(IDS, device=DEVICE), weight, vectors, *rest


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))


CASES = [
    *(Case(6, 17, 33, 3, rows=3, format=name) for name in FORMATS),
    *(Case(6, 17, 70, 2, FP16, rows="random", format=name) for name in ("dense", "lossless:4", "low-rank", "int8:32")),
    *(Case(6, 17, 70, 2, FP32, rows=2, format=name) for name in ("dense", "sparse", "low-rank", "sign:128")),
    *(Case(6, 17, 33, 8, dtype, rows="random", format="mixed") for dtype in (BF16, FP16, FP32)),
    *(Case(6, 17, 40, 3, BF16, FP32, rows=6, format=name) for name in ("dense", "low-rank")),
    *(Case(6, 17, 40, 16, rows=3, format=name) for name in ("dense", "mixed")),
    Case(6, 17, 1100, 1),
    Case(6, 17, 5, 1, format="int4:128"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_rounding(case):
    args = _make(case)
    y = embedding(*args)
    assert y.dtype == case.dtype
    assert_one_rounding(y, _truth(*args))


def test_ids_of_32_bits_and_with_strides():
    ids, *rest = _make(Case(6, 17, 33, 3, rows=3))
    strided = torch.stack([ids, ids], 1).to(torch.int32)[:, 0]
    assert torch.equal(embedding(strided, *rest), embedding(ids, *rest))


def test_more_tokens_than_a_tile():
    ids = torch.arange(70, device=DEVICE) % 17
    _, *rest = _make(Case(6, 17, 33, 3, rows=7, format="mixed"))
    assert_one_rounding(embedding(ids, *rest), _truth(ids, *rest))


def test_zero_coefficients_leave_the_base():
    ids, weight, vectors, columns, table, *rest = _make(Case(6, 17, 33, 3, rows=3, format="lossless:4"))
    weight[3] = -0.0
    table[1] = 0
    vectors[0].parts[3].fill_(torch.nan)
    table[:, columns[0]] = 0
    y = embedding(ids, weight, vectors, columns, table, *rest)
    assert torch.equal(y[2:4].view(torch.int16), weight[ids[2:4]].view(torch.int16))
    truth = _truth(ids, weight, vectors[1:], columns[1:], table, *rest)
    assert_one_rounding(y, truth)


def test_later_writes_are_read():
    args = _make(Case(6, 17, 33, 3, rows=3, format="mixed"))
    embedding(*args)
    args[4].neg_()
    args[5].fill_(2)
    assert_one_rounding(embedding(*args), _truth(*args))


def test_rows_that_do_not_divide_give_nan():
    assert embedding(*_make(Case(6, 17, 33, 3, rows=4))).isnan().all()


def test_ids_outside_the_vocabulary_give_nan():
    ids, *rest = _make(Case(6, 17, 33, 3, rows=1, format="mixed"))
    ids[1], ids[4] = 17, -1
    y = embedding(ids, *rest)
    assert y[[1, 4]].isnan().all()
    assert y[[0, 2, 3, 5]].isfinite().all()


def test_too_many_vectors_are_refused():
    ids, weight, vectors, *rest = _make(Case(6, 17, 33, 1))
    with pytest.raises(AlignvecError, match="17 vectors"):
        embedding(ids, weight, vectors * 17, *rest)
