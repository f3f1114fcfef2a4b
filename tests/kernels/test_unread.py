"""A coefficient of 0 means that a token does not read the vector: its result has the bits that it has beside any other
vector in that place, whatever the product is. By operator, format and implementation."""

import pytest
import torch

from alignvec.kernels import eager, materialise, operands, reference
from alignvec.kernels.embedding import embedding
from alignvec.kernels.norm import layer_norm, rms_norm
from tests.kernels.cases import (
    BF16,
    CPP,
    DEVICE,
    FORMATS,
    FP16,
    FP32,
    IMPLEMENTATIONS,
    Case,
    assert_one_rounding,
    implementation,
)
from tests.kernels.unread import HUGE, overflowing, table_of, unread

if CPP:
    from alignvec.compiled import cpu

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter, of what overflows

CASES = [Case(4, 33, 150, 2, rows=4, format=name, bias=True) for name in FORMATS]
CASES += [Case(tokens, 33, 70, 2, rows=rows) for tokens, rows in ((1, 1), (2, 2), (8, 2), (17, "random"), (64, 4))]
CASES += [Case(64, 33, 150, 2, rows=2, format=name) for name in ("int4:32", "lossless:4", "low-rank")]
CASES += [Case(8, 33, 70, 2, FP32, rows=2, format=name) for name in ("dense", "sparse", "low-rank", "int8:32")]
CASES += [Case(8, 33, 70, 2, FP16, FP32, rows=2, format=name) for name in ("dense", "low-rank", "sign:row")]
EMBEDDINGS = {"torch": eager.embedding, "triton": embedding} | ({"cpp": cpu.embedding} if CPP else {})
RMS_NORMS = {"torch": eager.rms_norm, "triton": rms_norm} | ({"cpp": cpu.rms_norm} if CPP else {})
LAYER_NORMS = {"torch": eager.layer_norm, "triton": layer_norm} | ({"cpp": cpu.layer_norm} if CPP else {})
MATERIALISED = {"torch": eager.materialise, "triton": materialise.materialise}
MATERIALISED |= {"cpp": cpu.materialise} if CPP else {}


def _make(case, first=1.0):
    """The operator's arguments, those with a first vector that overflows, and which tokens do not read it."""
    x, weight, bias, vectors, bias_deltas, columns, _, rows, token_rows = case.make()
    table = table_of(case, columns.cpu(), first).to(DEVICE)
    rest = (bias_deltas, columns, table, rows, token_rows)
    huge = [overflowing(vectors[0]), vectors[1]]
    huge_biases = None if bias_deltas is None else torch.stack([torch.full_like(bias_deltas[0], HUGE), bias_deltas[1]])
    own = unread(case, token_rows).to(DEVICE)
    return (x, weight, bias, vectors, *rest), (x, weight, bias, huge, huge_biases, *rest[1:]), own


def _assert_unread(run, tame, huge, own):
    """The tokens of `own` have the bits that a tame vector leaves them; the others show that they read an infinite."""
    expected, y = run(*tame), run(*huge)
    assert y[own].isfinite().all()
    assert torch.equal(y[own], expected[own])
    return y


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear(case, name):
    tame, huge, own = _make(case)
    y = _assert_unread(implementation(name), tame, huge, own)
    assert not y[~own].isfinite().all() or own.all()
    without = (*tame[:3], tame[3][1:], None if tame[4] is None else tame[4][1:], tame[5][1:], *tame[6:])
    truth = reference.linear(*without)
    assert_one_rounding(y[own], truth[own])
    assert_one_rounding(reference.linear(*huge)[own].to(y.dtype), truth[own])


@pytest.mark.parametrize("name", ["torch-auto", "triton-split", "triton-combine", *(["cpp-auto"] if CPP else [])])
@pytest.mark.parametrize("format", FORMATS)
def test_no_token_reads_it(format, name):
    tame, huge, own = _make(Case(5, 33, 70, 2, format=format), first=0.0)
    _assert_unread(implementation(name), tame, huge, torch.ones_like(own))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_of_the_input(case):
    (_, weight, _, vectors, _, *rest), (_, _, _, huge, _, *_), own = _make(case)
    grad = torch.randn(case.tokens, case.out_features, device=DEVICE).to(case.dtype)
    _assert_unread(eager.linear_input_grad, (grad, weight, vectors, *rest), (grad, weight, huge, *rest), own)


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_embedding(case, name):
    (_, weight, _, vectors, _, *rest), (_, _, _, huge, _, columns, table, *others), own = _make(case)
    weight[5] = -0.0
    ids = torch.arange(case.tokens, device=DEVICE) % 17 + 5
    table = torch.where(table == 0.5, 0, table * 10)  # 3e39 is infinite
    tame, huge = (ids, weight, vectors, *rest), (ids, weight, huge, columns, table, *others)
    y = _assert_unread(EMBEDDINGS[name], (*tame[:4], table, *others), huge, own)
    assert torch.equal(y[own].view(torch.uint8), weight[ids][own].view(torch.uint8))


@pytest.mark.parametrize("rows", [1, 2, "random"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", RMS_NORMS)
def test_norms(name, dtype, rows):
    case = Case(8, 33, 33, 2, dtype, rows=rows)
    x, _, _, _, _, columns, _, used, token_rows = case.make()
    weight, bias, *deltas = torch.randn(4, 33, device=DEVICE).to(dtype)
    tame = torch.stack(deltas).float()
    huge = torch.stack([torch.full_like(tame[0], HUGE), tame[1]])
    rest = (columns, table_of(case, columns.cpu(), 10.0).to(DEVICE), used, token_rows)  # 3e39 is infinite
    own = unread(case, token_rows).to(DEVICE)

    def rms(deltas):
        return RMS_NORMS[name](x, weight, deltas, *rest, eps=1e-5)

    def layer(deltas):
        return LAYER_NORMS[name](x, weight, bias, deltas, deltas, *rest, eps=1e-5)

    for run in (rms, layer):
        _assert_unread(run, (tame,), (huge,), own)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MATERIALISED)
def test_materialise(name, format):
    (_, weight, _, vectors, _, columns, table, rows, _), (_, _, _, huge, *_), _ = _make(
        Case(1, 33, 150, 2, format=format)
    )
    found = []
    for own in (vectors, huge):
        out = torch.full_like(weight, torch.nan)
        MATERIALISED[name](weight, own, columns, table, rows, out=out)
        found.append(out)
    assert found[1].isfinite().all()
    assert torch.equal(*found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_of_other_modules(case):
    (_, weight, _, vectors, _, columns, table, *_), (_, _, _, huge, *_), _ = _make(case)
    rows = torch.tensor([4], dtype=torch.int32, device=DEVICE)
    tame, mixed = (eager.mix(weight, own, columns, table, rows, 4) for own in (vectors, huge))
    assert torch.equal(mixed[::2], tame[::2])
    alone = eager.mix(weight, vectors[1:], columns[1:], table, rows, 4)
    assert torch.equal(mixed[::2], alone[::2])


def test_the_reference():
    table = torch.tensor([[0.0], [1.0]])
    values = torch.full((3, 4), torch.inf)
    x, weight, columns = torch.ones(2, 4), torch.ones(3, 4), torch.zeros(1, dtype=torch.int32)
    y = reference.linear(x, weight, None, [operands.dense(values)], None, columns, table, torch.tensor([2]))
    assert y.tolist() == [[4.0] * 3, [torch.inf] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mix_of_no_vector_is_not_the_parameter_itself(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 4, dtype=dtype)
    table, rows = torch.zeros(1, 1), torch.ones(1, dtype=torch.int32)
    mixed = eager.mix(weight, [operands.dense(torch.ones(3, 4))], torch.zeros(1, dtype=torch.int32), table, rows, 1)
    assert torch.equal(mixed[0], weight)
    assert mixed.data_ptr() != weight.data_ptr()
