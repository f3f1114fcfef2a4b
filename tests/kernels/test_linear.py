"""Every implementation of the linear operator against the float64 reference."""

import mmap

import pytest
import torch

from alignvec.errors import AlignvecError
from alignvec.kernels import eager, linear, operands, reference
from alignvec.kernels.configs import Config
from alignvec.kernels.packing import Projection
from tests.kernels.cases import (
    BF16,
    CPP_IMPLEMENTATIONS,
    DEVICE,
    FORMATS,
    FP16,
    FP32,
    IMPLEMENTATIONS,
    SPLIT_3,
    TILE,
    Case,
    assert_one_rounding,
    implementation,
    relative_error,
)

CASES = [
    Case(1, 70, 130, 1),
    Case(5, 129, 257, 3, bias=True),
    Case(12, 70, 150, 3, rows=4),
    Case(20, 33, 65, 8, rows="random", bias=True),
    Case(6, 40, 70, 16, rows=2, bias=True),
    Case(12, 70, 150, 3, delta=FP32, rows=2, bias=True),
    Case(9, 40, 150, 2, FP16),
    Case(12, 70, 130, 3, FP16, rows=3, bias=True),
    Case(7, 33, 150, 8, FP16, delta=FP32, rows="random"),
    Case(7, 33, 70, 3, FP16, delta=BF16),
    Case(1, 129, 70, 3, FP32),
    Case(10, 70, 150, 3, FP32, rows=5, bias=True),
    Case(33, 40, 65, 16, FP32, delta=BF16, rows="random", bias=True),
    Case(64, 100, 96, 3, rows=2),
    Case(50, 45, 200, 3, bias=True),
    Case(50, 45, 200, 3, FP32),
]
FORMAT_CASES = [
    Case(6, 40, 150, k, FP16 if k == rows == 3 else BF16, rows=rows, format=name, bias=rows == 3)
    for name in (*FORMATS[1:], "mixed")
    for k in (1, 3, 8)
    for rows in (1, 3, "random")
]
FORMAT_CASES += [Case(6, 40, 150, 3, FP32, rows=2, format=name) for name in ("int4:32", "sign:row", "mixed")]
FORMAT_CASES += [
    Case(6, 40, 150, 16, delta=FP32, rows=2, format="mixed", bias=True),
    Case(40, 33, 600, 9, format="mixed"),
    Case(1, 33, 700, 9, format="mixed"),
    Case(1, 33, 700, 7, FP32, format="mixed"),
]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh memory holds NaN: an output that was not written shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poison(new_empty(*a, **k)))


def _poison(t):
    return t.fill_(float("nan")) if t.is_floating_point() else t


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [*CASES, *FORMAT_CASES], ids=str)
def test_one_rounding_from_the_truth(case, name):
    args = case.make()
    y = implementation(name)(*args)
    assert y.dtype == case.dtype
    assert y.shape == (case.tokens, case.out_features)
    assert_one_rounding(y, reference.linear(*args))


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("name", [*FORMATS, "mixed"])
def test_materialised_is_one_rounding_from_the_truth(name, k):
    args = Case(6, 40, 150, k, format=name, bias=k == 3).make()
    assert_one_rounding(linear.linear(*args, execution="materialise"), reference.linear(*args))


@pytest.mark.parametrize("config", [TILE, SPLIT_3], ids=["one_part", "split_k"])
@pytest.mark.parametrize("name", ["dense", "int4:32", "lossless:4", "sparse", "low-rank", "mixed"])
def test_projections_of_one_input_in_one_launch(name, config):
    """Three layers with different outputs, vectors and biases; entries of the mixed ones have different planes."""
    layers = [
        Case(6, n, 150, k, rows=3, bias=b, format=name) for n, k, b in ((70, 9, True), (33, 1, False), (40, 4, True))
    ]
    made = [case.make(seed) for seed, case in enumerate(layers)]
    x, rows, table = made[0][0], made[0][7], torch.randn(8, 11, device=DEVICE)
    projections = [Projection(*args[1:6]) for args in made]
    together = linear.linear_group(x, projections, table, rows, execution="split", config=config)
    for args, y in zip(made, together, strict=True):
        assert_one_rounding(y, reference.linear(x, *args[1:6], table, rows))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_any_strides(name, dtype):
    x, w, bias, vectors, bias_d, *rest = Case(6, 36, 70, 3, dtype, rows=2, bias=True).make()
    weight = w.t().contiguous().t()  # as Conv1D passes them
    deltas = [vector.parts[0].t().contiguous().t() for vector in vectors]
    x = torch.stack([x, x], dim=2)[:, :, 1]
    bias = torch.stack([bias, bias], dim=1)[:, 0]
    bias_deltas = bias_d.t().contiguous().t()
    assert not any(t.is_contiguous() for t in (x, weight, bias, *deltas, bias_deltas))
    args = (x, weight, bias, [operands.dense(delta) for delta in deltas], bias_deltas, *rest)
    assert_one_rounding(implementation(name)(*args), reference.linear(*args))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_only_the_bias_is_edited(name):
    x, w, bias, _, *rest = Case(6, 36, 70, 3, bias=True).make()
    args = (x, w, bias, [operands.dense(w.new_zeros(1, 1).expand(w.shape))] * 3, *rest)
    assert_one_rounding(implementation(name)(*args), reference.linear(*args))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_that_do_not_divide_the_tokens_give_nan(name):
    args = Case(10, 40, 70, 3, rows=4, bias=True).make()
    assert implementation(name)(*args).isnan().all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_tokens(name):
    x, *rest = Case(4, 40, 70, 3, bias=True).make()
    y = implementation(name)(x[:0], *rest)
    assert y.shape == (0, 40)
    assert y.dtype == x.dtype


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_later_writes_to_table_and_rows_are_honoured(name):
    args = Case(12, 40, 70, 3).make()
    table, rows = args[6], args[7]
    before = implementation(name)(*args)
    table.neg_()
    rows.fill_(3)
    after = implementation(name)(*args)
    assert relative_error(after, before.double()) > 0.1
    assert_one_rounding(after, reference.linear(*args))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "case",
    [
        *(Case(128, 64, 256, 4, dtype, format=name) for dtype in (BF16, FP16, FP32) for name in ("dense", "mixed")),
        *(Case(64, 32, 256, 2, format=name) for name in FORMATS[1:]),
    ],
    ids=str,
)
def test_integers_are_exact(name, case):
    """Sums of small integers leave no room for a rounding: a wrong product anywhere shows, as of a miscompiled dot."""
    args = case.make(integers=True)
    rows, run = args[7], implementation(name)
    for count in (1, 4):
        rows.fill_(count)
        assert torch.equal(run(*args), reference.linear(*args).to(case.dtype))


@pytest.mark.parametrize(
    "name", ["torch-auto", "torch-combine", "triton-combine", "triton-auto", *CPP_IMPLEMENTATIONS[1:]]
)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name_of_format", ["dense", "int4:32", "sparse"])
def test_merged_is_a_stored_merge(name, dtype, name_of_format):
    args = Case(6, 64, 150, 3, dtype, bias=True, format=name_of_format).make()
    x, weight, bias, vectors, bias_deltas, columns, table, *_ = args
    c = table[0, columns].double()
    deltas = torch.stack([operands.decode(vector, weight) for vector in vectors])
    merged = (weight.double() + torch.einsum("i,inm->nm", c, deltas.double())).to(dtype)
    merged_bias = (bias.double() + c @ bias_deltas.double()).to(dtype)
    truth = x.double() @ merged.double().t() + merged_bias.double()
    y = implementation(name)(*args, precision="merged")
    # The mix is summed in float32, so that one weight in thousands rounds to the other neighbour.
    assert relative_error(y, truth) <= 1.05 * relative_error(truth.to(dtype), truth) + 1e-4
    assert relative_error(y, reference.linear(*args)) > 1.1 * relative_error(y, truth)


@pytest.mark.parametrize("name", ["torch-auto", "torch-combine", "triton-combine", *CPP_IMPLEMENTATIONS[1:]])
def test_merged_rounds_the_mix_of_every_row(name):
    """Each row of a mixed batch is what it is alone."""
    x, *layer, rows, token_rows = Case(12, 64, 150, 3, rows=4, bias=True).make()
    table, run = layer[-1], implementation(name)
    together = run(x, *layer, rows, token_rows, precision="merged")
    for row, own in enumerate(together.split(3)):
        alone = run(x, *layer[:-1], table[row : row + 1], torch.ones_like(rows), None, precision="merged")
        # Sums in another order, for other numbers of tokens, round a few outputs to the other neighbour.
        assert relative_error(own, alone[3 * row : 3 * row + 3].double()) < 5e-4


def test_tiles_of_one_row_and_of_several_in_one_launch():
    """Three rows of 20 tokens over tiles of 16: some tiles have one row, others two."""
    args = Case(60, 40, 70, 3, rows=3, bias=True).make()
    y = linear.linear(*args, execution="combine", config=Config(16, 64, 64, 4, 2))
    assert_one_rounding(y, reference.linear(*args))


@pytest.mark.parametrize("execution", ["split", "combine"])
@pytest.mark.parametrize("tokens", [3, 100])
def test_shipped_configurations(execution, tokens):
    args = Case(tokens, 150, 300, 3, bias=True).make()
    assert_one_rounding(linear.linear(*args, execution=execution), reference.linear(*args))


def test_split_k_is_deterministic():
    args = Case(8, 64, 300, 3).make()
    first, *others = (implementation("triton-split_k")(*args) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_addresses_beyond_32_bits():
    """A delta's last rows lie beyond 2^31 elements, in memory of which only the touched pages exist."""
    x, weight, bias, vectors, *rest = Case(4, 16, 32, 3).make()
    stride, values = 2**31 // 15 + 64, vectors[2].parts[0]
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (15 * stride + 32)), dtype=BF16).to(DEVICE)
    far = memory.as_strided(values.shape, (stride, 1))
    far.copy_(values)
    args = (x, weight, bias, [*vectors[:2], operands.dense(far)], *rest)
    for execution in ("split", "combine"):
        y = linear.linear(*args, execution=execution, config=TILE)
        assert_one_rounding(y, reference.linear(x, weight, bias, vectors, *rest))


@pytest.mark.parametrize("rows", [1, 4, "random"])
@pytest.mark.parametrize("name", ["torch-split", "torch-combine"])
@pytest.mark.parametrize("format", ["dense", "mixed"])
def test_torch_in_blocks_of_output_rows(name, rows, format, monkeypatch):
    monkeypatch.setattr(eager, "BLOCK_WEIGHTS", 1)
    args = Case(12, 70, 150, 9, rows=rows, bias=True, format=format).make()
    assert_one_rounding(implementation(name)(*args), reference.linear(*args))


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("case", [*CASES, *FORMAT_CASES], ids=str)
def test_input_gradient(case, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(eager, "BLOCK_WEIGHTS", 1)
    x, weight, bias, vectors, bias_deltas, *rest = case.make()
    x = x.double().requires_grad_()
    y = reference.linear(x, weight, bias, vectors, bias_deltas, *rest)
    grad = torch.randn(y.shape, device=DEVICE).to(case.dtype)
    y.backward(grad.double())
    assert_one_rounding(eager.linear_input_grad(grad, weight, vectors, *rest), x.grad)


def test_more_than_16_vectors_are_refused():
    with pytest.raises(AlignvecError, match="17 vectors"):
        linear.linear(*Case(4, 16, 32, 17).make())
