"""csrc/cpu apart from the linear operator, which tests/kernels tests beside others: mixes, lookups, norms, refusals."""

import pytest
import torch

from alignvec.kernels import eager, operands, reference
from tests.kernels.cases import BF16, CPP, FORMATS, FP32, Case, assert_one_rounding, implementation, relative_error

pytestmark = pytest.mark.skipif(not CPP, reason="csrc/cpu is not built, or there is a GPU")
if CPP:
    from alignvec.compiled import cpu

SHAPES = [(40, 96), (33, 77), (17, 513)]
FORMATS_OF = [(name, dtype) for name in (*FORMATS, "mixed") for dtype in (BF16, FP32)]
FORMATS_OF = [(name, dtype) for name, dtype in FORMATS_OF if dtype == BF16 or not name.startswith("lossless")]
ID = {BF16: "bf16", FP32: "fp32"}.get


def _poisoned(like):
    return torch.full_like(like, torch.nan)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), FORMATS_OF, ids=lambda value: ID(value, value))
def test_mix_written_out(name, dtype, shape):
    _, weight, _, vectors, _, columns, table, rows, _ = Case(
        1, *shape, 9 if name == "mixed" else 3, dtype, format=name
    ).make()
    out, low = _poisoned(weight), _poisoned(weight)
    cpu.materialise(weight, vectors, columns, table, rows, out=out, low=low)
    truth = reference.mix(weight, vectors, columns, table[:1], rows, 1)[0]
    assert relative_error(out, truth) <= 1.02 * relative_error(truth.to(dtype), truth) + 2e-6
    assert relative_error(out.double() + low.double(), truth) < 2**-17
    again = _poisoned(weight)
    cpu.materialise(weight, vectors, columns, table, rows, out=again)
    assert torch.equal(again, out)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lossless_at_coefficient_one_is_the_checkpoint_bit_for_bit(bits):
    generator = torch.Generator().manual_seed(bits)
    base = torch.randn(9, 150, generator=generator).bfloat16()
    base[0, :4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    fields = torch.randint(1, 1 << bits, base.shape, generator=generator).to(torch.uint8)
    fields[torch.rand(base.shape, generator=generator) < 0.1] = 0
    index = (fields == 0).flatten().nonzero().flatten()
    values = torch.randn(len(index), generator=generator).bfloat16()
    values[::3] = -0.0
    vector = operands.from_steps(fields, bits, index, values)
    other = operands.dense(torch.randn_like(base))
    out, low = _poisoned(base), _poisoned(base)
    columns, table = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([[0.0, 1.0]])
    cpu.materialise(base, [other, vector], columns, table, torch.ones(1, dtype=torch.int32), out=out, low=low)
    assert torch.equal(out.view(torch.int16), operands.aligned(vector, base).view(torch.int16))
    assert not low.any()


@pytest.mark.parametrize("rows", [1, 3, "random"])
@pytest.mark.parametrize(("name", "dtype"), FORMATS_OF, ids=lambda value: ID(value, value))
def test_lookup(name, dtype, rows):
    case = Case(6, 40, 130, 9 if name == "mixed" else 2, dtype, rows=rows, format=name)
    _, weight, _, vectors, _, *coefficients = case.make()
    args = (torch.tensor([0, 16, 3, 3, 39, 20]), weight, vectors, *coefficients)
    assert_one_rounding(cpu.embedding(*args), reference.embedding(*args))


@pytest.mark.parametrize("rows", [1, 3, "random"])
@pytest.mark.parametrize("features", [33, 1100])
@pytest.mark.parametrize("delta", [BF16, FP32], ids=lambda dtype: f"delta_{ID(dtype)}")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=ID)
def test_norms(dtype, delta, features, rows):
    x = (3 * torch.randn(6, features) + 1).to(dtype)
    weight, bias = torch.randn(2, features).to(dtype)
    deltas, bias_deltas = (0.3 * torch.randn(2, 3, features)).to(delta)
    columns, table = torch.tensor([4, 0, 2], dtype=torch.int32), torch.randn(8, 5)
    used = torch.tensor([1 if rows == "random" else rows], dtype=torch.int32)
    token_rows = torch.randint(8, (6,), dtype=torch.int32) if rows == "random" else None
    c = reference.token_coefficients(table, used, columns, 6, token_rows).double()
    scale, shift = weight.double() + c @ deltas.double(), bias.double() + c @ bias_deltas.double()
    shared = (columns, table, used, token_rows)
    normed = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt()
    assert_one_rounding(cpu.rms_norm(x, weight, deltas, *shared, eps=1e-5, offset=1.0), normed * (scale + 1))
    centred = x.double() - x.double().mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    assert_one_rounding(cpu.layer_norm(x, weight, bias, deltas, bias_deltas, *shared, eps=1e-5), normed * scale + shift)
    assert_one_rounding(cpu.layer_norm(x, weight, None, deltas, None, *shared, eps=1e-5), normed * scale)


@pytest.mark.parametrize("name", ["cpp-split", "cpp-combine"])
@pytest.mark.parametrize("tokens", [1, 3, 4, 17, 66])
@pytest.mark.parametrize("out_features", [1, 3, 5])
def test_few_outputs(out_features, tokens, name):
    args = Case(tokens, out_features, 70, 3, format="mixed", rows="random" if tokens == 17 else 1).make()
    assert_one_rounding(implementation(name)(*args), reference.linear(*args))


@pytest.mark.parametrize("name", ["cpp-split", "cpp-combine"])
@pytest.mark.parametrize("in_features", [1, 15, 64, 2049, 5000])
def test_inputs_of_every_length(in_features, name):
    for tokens in (1, 6):
        args = Case(tokens, 6, in_features, 9, format="mixed").make()
        assert_one_rounding(implementation(name)(*args), reference.linear(*args))


@pytest.mark.parametrize("name", ["cpp-split", "cpp-combine"])
def test_no_inputs_leave_the_bias(name):
    x, weight, bias, _, bias_deltas, *rest = Case(5, 6, 8, 2, bias=True).make()
    vectors = [operands.dense(weight[:, :0])] * 2
    args = (x[:, :0], weight[:, :0], bias, vectors, bias_deltas, *rest)
    assert_one_rounding(implementation(name)(*args), reference.linear(*args))


def test_the_same_call_gives_the_same_bits_with_any_number_of_threads():
    args = Case(40, 70, 300, 3, rows=2, bias=True).make()
    threads, seen = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        seen += [implementation("cpp-split")(*args), implementation("cpp-combine")(*args)]
    torch.set_num_threads(threads)
    assert all(torch.equal(seen[i], seen[i % 2]) for i in range(6))


def test_what_is_not_compiled_goes_to_torch():
    """float16, activations in another dtype than the weight, and layers without inputs."""
    x, weight, *rest = Case(5, 40, 70, 3, bias=True).make()
    for other in (x.half(), x.float()):
        args = (other, weight.to(torch.float16) if other.dtype == torch.float16 else weight, *rest)
        assert torch.equal(cpu.linear(*args), eager.linear(*args))
    args = (x[:, :0], weight[:, :0], rest[0], [operands.dense(weight[:, :0])] * 3, *rest[2:])
    assert torch.equal(cpu.linear(*args), eager.linear(*args))


def _with(position, value):
    """The arguments of `cpu_linear` for a small call, one of them replaced."""
    x, weight, bias, vectors, bias_deltas, columns, table, rows, _ = Case(
        4, 40, 70, 2, bias=True, format="lossless:4"
    ).make()
    layout = [number for o in vectors for number in (2, o.bits, o.width, o.group)]
    parts = [part for o in vectors for part in o.parts]
    y = torch.empty(4, 40, dtype=BF16)
    args = [x, weight, bias, layout, parts, bias_deltas, columns, table, rows, None, 0, False, y]
    args[position] = value(args[position])
    return args


def test_a_layer_without_inputs_is_refused():
    args = _with(0, lambda x: x[:, :0])
    args[1] = args[1][:, :0]
    with pytest.raises(RuntimeError, match="weight: it must have inputs"):
        torch.ops.alignvec.cpu_linear(*args)


def test_groups_of_nothing_are_refused():
    x, weight, _, vectors, _, columns, table, rows, _ = Case(4, 40, 70, 2, format="int4:32").make()
    layout = [number for o in vectors for number in (1, o.bits, o.width, 0)]
    parts = [part for o in vectors for part in o.parts]
    y = torch.empty(4, 40, dtype=BF16)
    with pytest.raises(RuntimeError, match="a group must be whole planes"):
        torch.ops.alignvec.cpu_linear(x, weight, None, layout, parts, None, columns, table, rows, None, 0, False, y)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, lambda x: x[:, :-1], "x: it must be"),
        (0, lambda x: x.float(), "dtype of the weight"),
        (2, lambda bias: bias[:-1], "bias: it must be"),
        (3, lambda layout: [9, *layout[1:]], "no kind 9"),
        (3, lambda layout: [*layout[:2], 24, *layout[3:]], "not a layout"),
        (4, lambda parts: parts[:-1], "too few"),
        (4, lambda parts: [*parts, parts[0]], "more tensors"),
        (4, lambda parts: [parts[0][:, :-32].contiguous(), *parts[1:]], "words"),
        (4, lambda parts: [parts[0], parts[1] + 1, *parts[2:]], "start"),
        (5, lambda deltas: deltas[:, :-1], "bias_deltas: it must be"),
        (6, lambda columns: columns + 7, "no column"),
        (8, lambda rows: rows + 8, "rows: the table has"),
        (9, lambda _: torch.tensor([0, 1, 2, 99], dtype=torch.int32), "no row 99"),
        (12, lambda y: y[:, :-1], "y: it must be"),
    ],
)
def test_what_would_be_read_out_of_bounds_is_refused(position, value, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.alignvec.cpu_linear(*_with(position, value))
