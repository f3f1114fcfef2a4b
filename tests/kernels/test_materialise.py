"""The mix written into weights, against float64 sums of decoded deltas."""

import pytest
import torch

from alignvec.errors import AlignvecError
from alignvec.kernels import operands
from alignvec.kernels.materialise import Config, materialise
from tests.kernels.cases import BF16, DEVICE, FORMATS, FP16, FP32, Case, assert_one_rounding, operand

ID = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}.get


def _poisoned(weight):
    return torch.full_like(weight, torch.nan)


def _truth(weight, vectors, columns, table):
    total = weight.double()
    for vector, column in zip(vectors, columns.tolist(), strict=True):
        total = total + table[0, column].double() * operands.decode(vector, weight).double()
    return total


def _run(case, **options):
    _, weight, _, vectors, _, columns, table, rows, _ = case.make()
    out = _poisoned(weight)
    assert materialise(weight, vectors, columns, table, rows, out=out, **options) is out
    return out, _truth(weight, vectors, columns, table)


CASES = [
    *(Case(1, 37, 161, 3, format=name) for name in FORMATS),
    *(Case(1, 9, 1100, 1, format=name) for name in ("int4:128", "int8:32", "sign:row", "lossless:2", "lossless:4")),
    *(Case(1, 33, 95, 3, FP16, format=name) for name in ("dense", "int4:32", "lossless:4", "sparse", "low-rank")),
    *(Case(1, 33, 95, 3, FP32, format=name) for name in ("dense", "int8:32", "sign:row", "sparse", "low-rank")),
    *(Case(1, 20, 70, 3, BF16, FP32, format=name) for name in ("dense", "sparse", "low-rank")),
    *(Case(1, 20, 70, 8, dtype, format="mixed") for dtype in (BF16, FP16, FP32)),
    Case(1, 37, 161, 16, format="int4:32"),
    Case(1, 37, 161, 16, format="mixed"),
    Case(1, 37, 161, 16),
    Case(1, 3, 5, 3, format="int4:128"),
    Case(1, 2, 3, 1, format="lossless:4"),
    Case(1, 1, 1, 1, format="sign:row"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_rounding(case):
    assert_one_rounding(*_run(case))


@pytest.mark.parametrize(
    "pair", [("int4:128", "sign:row"), ("lossless:4", "int8:128", "sparse", "dense")], ids="+".join
)
def test_planes_of_several_widths_of_field(pair):
    """One launch in planes: programs own the inputs of the fewest planes, and a part of the words of the others."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(19, 4100, generator=g).to(BF16)
    vectors = [operand(name, weight, BF16, g).to(torch.device(DEVICE)) for name in pair]
    weight = weight.to(DEVICE)
    columns = torch.arange(len(pair), dtype=torch.int32, device=DEVICE)
    table, rows = torch.randn(1, len(pair)).to(DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)
    out = materialise(weight, vectors, columns, table, rows, out=_poisoned(weight))
    assert_one_rounding(out, _truth(weight, vectors, columns, table))


@pytest.mark.parametrize("config", [Config(64, 8), Config(256, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ["mixed", "lossless:8"])
def test_tiles_without_planes(name, config):
    vectors = 5 if name == "mixed" else 2
    assert_one_rounding(*_run(Case(1, 11, 300, vectors, format=name), config=config))


@pytest.mark.parametrize("name", ["dense", "int4:32", "lossless:4", "sparse", "low-rank"])
def test_transposed_weight(name):
    """GPT-2's Conv1D: contiguous along the outputs."""
    _, weight, _, vectors, _, columns, table, rows, _ = Case(1, 90, 70, 3, format=name).make()
    weight = weight.t().contiguous().t()
    out = _poisoned(weight)
    assert out.stride() == weight.stride()
    materialise(weight, vectors, columns, table, rows, out=out)
    assert_one_rounding(out, _truth(weight, vectors, columns, table))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=ID)
@pytest.mark.parametrize("name", ["dense", "int8:128", "mixed"])
def test_pair_holds_the_mix_to_17_bits(dtype, name):
    _, weight, _, vectors, _, columns, table, rows, _ = Case(1, 30, 130, 3, dtype, format=name).make()
    out, low = _poisoned(weight), _poisoned(weight)
    materialise(weight, vectors, columns, table, rows, out=out, low=low)
    truth = _truth(weight, vectors, columns, table)
    assert torch.equal(out, materialise(weight, vectors, columns, table, rows, out=_poisoned(weight)))
    error = (out.double() + low.double() - truth).abs()
    # Sums of float32 are off by parts of their terms; the last term is float16's distance between subnormals.
    assert (error <= truth.abs() * 2**-16 + 2**-22 * weight.abs().max() + (2**-24 if dtype == FP16 else 0)).all()
    assert ((out.double() + low.double() - truth).norm() / truth.norm()).item() < 2**-17


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=ID)
def test_pair_realises_steps_of_one_ulp(dtype):
    """Every delta one ULP of weights in one binade: what a rounding to nearest loses alike for all of them."""
    weight = (1 + torch.rand(16, 512, device=DEVICE)).mul(2.0**-6).to(dtype)
    delta = torch.full_like(weight, 2.0**-6 * torch.finfo(dtype).eps)
    columns = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    rows = torch.ones(1, dtype=torch.int32, device=DEVICE)
    for c in (0.3, -0.01, 1e-3):
        table = torch.full((1, 1), c, device=DEVICE)
        out, low = _poisoned(weight), _poisoned(weight)
        materialise(weight, [operands.dense(delta)], columns, table, rows, out=out, low=low)
        edit = out.double() + low.double() - weight.double()
        realised = (edit * delta.double()).sum() / delta.double().square().sum()
        assert abs(realised.item() - c) < 1e-3


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=ID)
def test_lossless_restores_the_aligned_checkpoint(dtype, bits):
    """At coefficient 1 the aligned bits, zeros of both signs included, whatever vectors with 0 stand beside it."""
    g = torch.Generator().manual_seed(bits)
    weight = torch.randn(35, 150, generator=g).to(dtype)
    aligned = (weight.float() * (1 + 0.02 * torch.randn(35, 150, generator=g))).to(dtype)
    zeros = torch.randint(35 * 150, (4, 60), generator=g)
    weight.view(-1)[zeros[0]], weight.view(-1)[zeros[1]] = 0.0, -0.0
    aligned.view(-1)[zeros[2]] = weight.view(-1)[zeros[2]]
    for sign, to in ((0, -0.0), (1, 0.0)):  # across zero: one step
        aligned.view(-1)[zeros[sign][:30]] = to
    step = _ordered(aligned) - _ordered(weight)
    half = 1 << (bits - 1)
    far = (step <= -half) | (step >= half)
    fields = torch.where(far, 0, step + half).to(torch.uint8)
    index = far.flatten().nonzero().flatten()
    vector = operands.from_steps(fields, bits, index, aligned.flatten()[index])
    others = [operand(name, weight, dtype, g) for name in ("int4:32", "lossless:4", "sparse")]
    device = torch.device(DEVICE)
    vectors = [others[0].to(device), vector.to(device), others[1].to(device), others[2].to(device)]
    columns, table = torch.arange(4, dtype=torch.int32, device=device), torch.zeros(1, 4, device=device)
    rows, base = torch.ones(1, dtype=torch.int32, device=device), weight.to(device)
    table[0, 1] = 1
    for chosen in (vectors[1:2], vectors):
        at = columns[1:2] if len(chosen) == 1 else columns
        got = materialise(base, chosen, at, table, rows, out=_poisoned(base))
        assert torch.equal(got.cpu().view(torch.int16), aligned.view(torch.int16))
    table.zero_()
    got = materialise(base, vectors, columns, table, rows, out=_poisoned(base))
    assert torch.equal(got.view(torch.int16), base.view(torch.int16))


def _ordered(values):
    bits = values.view(torch.int16).int()
    return bits ^ ((bits >> 15) & 0x7FFF)


@pytest.mark.parametrize("name", FORMATS)
def test_zero_coefficient_reads_nothing(name):
    """The parts of a vector with coefficient 0 are NaN and indices from nowhere: nothing of them may be touched."""
    _, weight, _, vectors, _, columns, table, rows, _ = Case(1, 20, 90, 2, format=name).make()
    table[0, columns[0]] = 0
    truth = _truth(weight, vectors, columns, table)
    for part in vectors[0].parts:
        part.fill_(torch.nan if part.is_floating_point() else torch.iinfo(part.dtype).max)
    assert_one_rounding(materialise(weight, vectors, columns, table, rows, out=_poisoned(weight)), truth)


def test_coefficients_are_read_when_it_runs():
    _, weight, _, vectors, _, columns, table, rows, _ = Case(1, 20, 90, 3, format="mixed").make()
    for _ in range(2):
        out = materialise(weight, vectors, columns, table, rows, out=_poisoned(weight))
        assert_one_rounding(out, _truth(weight, vectors, columns, table))
        table.neg_()
    rows.fill_(2)
    assert materialise(weight, vectors, columns, table, rows, out=_poisoned(weight)).isnan().all()


def test_no_vectors():
    weight = torch.randn(20, 33, device=DEVICE).to(BF16)
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    rows = torch.ones(1, dtype=torch.int32, device=DEVICE)
    assert torch.equal(
        materialise(weight, [], none, torch.zeros(1, 1, device=DEVICE), rows, out=_poisoned(weight)), weight
    )


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=ID)
def test_bias(dtype):
    weight, deltas = torch.randn(1, 77, device=DEVICE).to(dtype), torch.randn(3, 77, device=DEVICE).to(dtype)
    table, rows = torch.randn(2, 4, device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)
    columns = torch.tensor([3, 0, 1], dtype=torch.int32, device=DEVICE)
    vectors = [operands.dense(delta[None]) for delta in deltas]
    out = materialise(weight, vectors, columns, table, rows, out=_poisoned(weight))
    assert_one_rounding(out, weight.double() + table[0, columns].double() @ deltas.double())


def test_bad_outputs_are_refused():
    _, weight, _, vectors, _, columns, table, rows, _ = Case(1, 20, 90, 1).make()
    for out, message in ((weight, "storage"), (weight.float(), "out must be"), (weight[1:].clone(), "out must be")):
        with pytest.raises(AlignvecError, match=message):
            materialise(weight, vectors, columns, table, rows, out=out)
    with pytest.raises(AlignvecError, match="low must be"):
        materialise(weight, vectors, columns, table, rows, out=weight.clone(), low=weight[1:].clone())
    with pytest.raises(AlignvecError, match="17 vectors"):
        materialise(weight, vectors * 17, columns, table, rows, out=weight.clone())
