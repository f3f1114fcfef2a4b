"""The CUDA decode kernels, through their operator, against the float64 reference: on a GPU, or without one emulated.

The emulator poisons shared memory with NaN, and what a copy will write until it is waited for; warps run one by one.
"""

import pytest
import torch
from torch import Tensor

from alignvec import compiled
from alignvec.compiled import cuda
from alignvec.errors import AlignvecError
from alignvec.kernels import operands, reference
from alignvec.kernels.packing import Projection
from tests.csrc import emulated
from tests.kernels.cases import BF16, DEVICE, FP32, Case, assert_one_rounding, operand, relative_error
from tests.kernels.unread import overflowing, table_of, unread

FORMATS = (
    "dense",
    "int8:128",
    "int8:64",
    "int8:32",
    "int4:128",
    "int4:64",
    "int4:32",
    "int4:16",
    "int4:256",
    "sign:row",
    "sign:128",
    "sign:32",
    "lossless:2",
    "lossless:4",
    "lossless:8",
)
MIXED = ("dense", "int4:32", "lossless:4", "sign:row", "int8:128", "lossless:8", "sign:128", "int4:128", "dense")

CASES = [Case(m, 33, 152, 3, format=name, rows=rows) for name in FORMATS for m, rows in ((3, 3), (12, "random"))]
CASES += [Case(2, 17, 2312, 3, format=name, rows=2) for name in FORMATS]  # several stages and chunks, the last in part
CASES += [Case(5, 20, 72, k, format=name, bias=True) for name in FORMATS for k in (1, 8)]
CASES += [Case(m, 16, 136, 2, format="int4:32", rows="random") for m in (1, 7, 8, 9, 16)]
CASES += [Case(2, 16, 6152, 2, format=name) for name in ("sign:row", "lossless:2")]  # more chunks than stages
CASES += [Case(m, 20, 2312, 11, format="sign:row", rows=m) for m in (4, 5)]  # eight in a stream, or four
CASES += [
    Case(1, 40, 520, 0),
    Case(16, 40, 520, 0, bias=True),
    Case(6, 40, 520, 16, rows=2, bias=True),
    Case(6, 70, 152, 3, delta=FP32, format="sign:row", rows=2, bias=True),
]


@pytest.fixture(scope="module", autouse=True)
def _library(tmp_path_factory):
    if DEVICE == "cpu":
        if emulated.compiler() is None:
            pytest.skip("no C++ compiler builds the emulator")
        torch.ops.load_library(emulated.build(tmp_path_factory.mktemp("emulated")))
    elif compiled.reason("cuda") is not None:
        pytest.skip(compiled.reason("cuda"))


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh memory holds NaN: an output that was not written shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def run(args, **options):
    x, *layer, table, rows, token_rows = args
    return cuda.decode(x, [Projection(*layer)], table, rows, token_rows, **options)[0]


def mixed(case: Case, integers: bool = False):
    """`case` with the formats of MIXED in turn, which the kernels have and `Case` would choose otherwise."""
    args = list(case.make(integers=integers))
    g = torch.Generator().manual_seed(1)
    args[3] = operands_of([MIXED[i % len(MIXED)] for i in range(case.k)], args[1], g, integers)
    return args


def operands_of(names, weight: Tensor, g: torch.Generator, integers: bool = False):
    made = [operand(name, weight.cpu(), BF16, g, integers) for name in names]
    return [vector.to(torch.device(DEVICE)) for vector in made]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_rounding_from_the_truth(case):
    args = case.make()
    assert_one_rounding(run(args), reference.linear(*args))


@pytest.mark.parametrize("tokens", [2, 8, 16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_token_at_0_does_not_read_the_vector(name, tokens):
    """Its result has the bits that it has beside a vector whose products do not overflow."""
    case = Case(tokens, 33, 152, 2, rows=2, format=name, bias=True)
    args = list(case.make())
    args[6] = table_of(case, args[5].cpu(), 1.0).to(DEVICE)
    own = unread(case, None).to(DEVICE)
    expected = run(args)
    args[3] = [overflowing(args[3][0]), args[3][1]]
    y = run(args)
    assert y[own].isfinite().all()
    assert torch.equal(y[own], expected[own])
    assert not y[~own].isfinite().all()


@pytest.mark.parametrize("k", [2, 9, 16])
def test_formats_mix_in_a_layer(k):
    args = mixed(Case(6, 33, 152, k, rows=2, bias=True))
    args[6] *= 0.2  # sums of many vectors stay near those of one
    assert_one_rounding(run(args), reference.linear(*args))


@pytest.mark.parametrize("name", [*FORMATS, "mixed"])
@pytest.mark.parametrize("tokens", [7, 13])
def test_integers_are_exact(name, tokens):
    case = Case(tokens, 33, 272, 3, rows="random", format="dense" if name == "mixed" else name)
    args = mixed(case, integers=True) if name == "mixed" else case.make(integers=True)
    assert torch.equal(run(args), reference.linear(*args).to(BF16))


@pytest.mark.parametrize("name", ["sign:row", "int4:32", "lossless:4", "mixed"])
def test_projections_of_one_input(name):
    """Six layers, more than a launch holds, with different outputs, vectors and biases."""
    sizes = ((70, 9, True), (33, 1, False), (40, 4, True), (16, 0, False), (1, 2, False), (17, 5, True))
    made = [Case(6, n, 152, k, rows=3, bias=b, format="int4:32") for n, k, b in sizes]
    made = [list(case.make(seed)) for seed, case in enumerate(made)]
    for seed, args in enumerate(made):
        g = torch.Generator().manual_seed(seed)
        names = [name] * len(args[3]) if name != "mixed" else [MIXED[(seed + i) % 9] for i in range(len(args[3]))]
        args[3] = operands_of(names, args[1], g)
    x, rows, table = made[0][0], made[0][7], 0.2 * torch.randn(8, 11, device=DEVICE)
    together = cuda.decode(x, [Projection(*args[1:6]) for args in made], table, rows)
    for args, y in zip(made, together, strict=True):
        assert_one_rounding(y, reference.linear(x, *args[1:6], table, rows))


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", ["sign:row", "int8:128", "lossless:2"])
def test_any_depth_of_the_ring_in_any_order_of_threads(name, stages, backwards, monkeypatch):
    args = Case(3, 17, 2600, 6, rows=3, format=name).make()
    args[3][5] = operands.dense(args[1] / 8)
    expected = run(args, stages=2)
    if backwards:
        monkeypatch.setenv("ALIGNVEC_EMULATE_BACKWARDS", "1")
    y = run(args, stages=stages)
    assert torch.equal(y, expected)
    assert_one_rounding(y, reference.linear(*args))


@pytest.mark.parametrize("name", ["dense", "int4:128", "lossless:4"])
def test_a_vector_that_nobody_uses_is_not_read(name):
    args = Case(4, 20, 520, 3, rows=2, format=name).make()
    used = args[6].clone()
    used[:, args[5][1]] = 0
    args = (*args[:6], used, *args[7:])
    expected = run(args)
    unused = args[3][1]
    for part in unused.parts:
        part.fill_(float("nan") if part.is_floating_point() else 0)
    assert torch.equal(run(args), expected)
    assert_one_rounding(
        expected, reference.linear(*args[:3], [args[3][0], args[3][2]], None, args[5][[0, 2]], *args[6:])
    )


def test_rows_that_do_not_divide_the_tokens_give_nan():
    assert run(Case(10, 20, 72, 3, rows=4, bias=True).make()).isnan().all()


def test_later_writes_to_table_and_rows_are_honoured():
    args = Case(12, 20, 72, 3, format="int4:32").make()
    before = run(args)
    args[6].neg_()
    args[7].fill_(3)
    after = run(args)
    assert relative_error(after, before.double()) > 0.1
    assert_one_rounding(after, reference.linear(*args))


def test_zeros_of_both_signs_and_subnormals_step_like_others():
    """A step from +0 to -0, steps among subnormals, and side entries at zeros: bit for bit."""
    weight = torch.randn(16, 64).to(BF16)
    weight[:, ::2] = torch.tensor([0.0, -0.0, 1e-40, -1e-40]).to(BF16).repeat(16, 8)
    fields = torch.randint(1, 16, weight.shape, dtype=torch.uint8)
    fields[3] = 0
    side = (fields == 0).flatten().nonzero().flatten()
    vector = operands.from_steps(fields, 4, side, torch.randn(len(side)).to(BF16))
    tensors = (torch.zeros(1, dtype=torch.int32), torch.ones(1, 1), torch.ones(1, dtype=torch.int32))
    args = (torch.randn(2, 64).to(BF16).to(DEVICE), weight.to(DEVICE), None, [vector.to(torch.device(DEVICE))], None)
    args = (*args, *(t.to(DEVICE) for t in tensors), None)
    assert_one_rounding(run(args), reference.linear(*args))


def test_strided_rows():
    x, weight, bias, vectors, *rest = Case(5, 20, 72, 2, bias=True).make()
    x, weight = torch.cat([x, x], 1)[:, :72], torch.cat([weight, weight], 1)[:, 72:]
    vectors = [operands.dense(torch.cat([v.parts[0], v.parts[0]], 1)[:, :72]) for v in vectors]
    args = (x, weight, bias, vectors, *rest)
    assert_one_rounding(run(args), reference.linear(*args))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(in_features=70), "by eights"),
        (dict(tokens=17), "1 to 16 tokens"),
        (dict(dtype=FP32), "bfloat16 activations"),
        (dict(delta=FP32), "dense deltas"),
        (dict(format="sparse"), "sparse"),
        (dict(format="low-rank"), "low-rank"),
    ],
)
def test_why_a_call_is_not_served(change, reason):
    case = {"tokens": 4, "out_features": 20, "in_features": 72, "k": 2} | change
    x, weight, bias, vectors, bias_deltas, columns, *_ = Case(**case).make()
    projections = [Projection(weight, bias, vectors, bias_deltas, columns)]
    assert reason in cuda.serves(x, projections)
    x, *rest = Case(4, 20, 72, 2, format="sign:row").make()
    projections = [Projection(*rest[:5])]
    assert cuda.serves(x, projections) is None
    assert "forms mixes" in cuda.serves(x, projections, execution="combine")
    assert "forms mixes" in cuda.serves(x, projections, precision="merged")


def test_calls_that_are_not_served_go_to_triton():
    args = Case(4, 20, 72, 2, format="sparse", rows=2).make()
    assert_one_rounding(cuda.linear(*args), reference.linear(*args))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is one")
def test_served_calls_need_a_gpu():
    with pytest.raises(AlignvecError, match="needs a GPU"):
        cuda.linear(*Case(4, 20, 72, 2, format="sign:row").make())


def test_the_operator_refuses_what_it_would_read_out_of_bounds():
    args = Case(4, 20, 72, 1, format="int4:32").make()
    short = operands.Operand("codes", (args[3][0].parts[0][:19], args[3][0].parts[1]), (20, 72), 4, 32, 32)
    with pytest.raises(RuntimeError, match="words must be"):
        run((*args[:3], [short], *args[4:]))
