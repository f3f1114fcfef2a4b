"""csrc/cpu's operators of a decode step beside tests/kernels/test_step.py: long caches, strides, groups, threads."""

import pytest
import torch

from alignvec import ops
from alignvec.kernels import eager_step, reference_step
from alignvec.ops import prepared
from tests.kernels.cases import BF16, CPP, FP16, FP32, assert_one_rounding, relative_error

pytestmark = pytest.mark.skipif(not CPP, reason="csrc/cpu is not built, or there is a GPU")
if CPP:
    from alignvec.compiled import cpu_step

ID = {BF16: "bf16", FP32: "fp32"}.get
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP32], ids=ID)


@pytest.fixture(autouse=True)
def _compiled_alone(monkeypatch, request):
    """Nothing here may pass by going to torch, and results lie in memory full of NaN."""
    new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: new(*args).fill_(torch.nan))
    if "elsewhere" not in request.node.name:
        for name in ("add_rms_norm", "rotary_append", "decode_attention", "gated"):
            monkeypatch.delattr(eager_step, name)


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def _filled(dtype, cache_rows, kv_heads, max_length, size, lengths, window=0):
    """Keys and values, heads beside positions in memory, NaN outside of what each row sees."""
    caches = [torch.full((cache_rows, max_length, kv_heads, size), torch.nan, dtype=dtype) for _ in range(2)]
    for cache in caches:
        for row, length in enumerate(lengths.tolist()):
            seen = slice(max(0, length + 1 - window) if window else 0, length + 1)
            cache[row, seen] = torch.randn(cache[row, seen].shape).to(dtype)
    return [cache.transpose(1, 2) for cache in caches]


def _assert_attention(y, truth):
    assert y.isfinite().all()
    assert relative_error(y, truth) <= 1.02 * relative_error(truth.to(y.dtype), truth) + 2e-6


@DTYPES
@pytest.mark.parametrize("window", [0, 1, 300], ids=lambda window: f"window_{window}")
@pytest.mark.parametrize("group", [1, 3, 4, 8], ids=lambda group: f"group_{group}")
@pytest.mark.parametrize("size", [12, 64, 80, 128])
def test_attention_over_rows_of_every_length(size, group, window, dtype):
    """From one key to nine stretches, about the stretches' ends, in one call."""
    kv_heads, max_length = 2, 1100
    lengths = _int32(0, 1099, 127, 128, 1, 500, 255)
    keys, values = _filled(dtype, 9, kv_heads, max_length, size, lengths, window)
    q = torch.randn(len(lengths), kv_heads * group + 3, 2 * size).to(dtype)[:, 2:-1, :size]
    y = cpu_step.decode_attention(q, keys, values, lengths, scale=0.3, window=window)
    truth = reference_step.decode_attention(q, keys, values, lengths, 0.3, window)
    assert y.shape == truth.shape
    assert y.dtype == dtype
    _assert_attention(y, truth)


def test_attention_of_scores_far_apart():
    """Stretches whose maxima are hundreds apart, either way, and a scale below 0."""
    lengths = _int32(599, 599)
    keys, values = _filled(FP32, 2, 1, 600, 64, lengths)
    q = torch.ones(2, 4, 64)
    keys[0, 0, 5], keys[1, 0, 590] = 5.0, 5.0
    for scale in (1.0, -1.0):
        y = cpu_step.decode_attention(q, keys, values, lengths, scale=scale, window=0)
        _assert_attention(y, reference_step.decode_attention(q, keys, values, lengths, scale, 0))


def test_a_value_that_is_seen_and_nan_is_not_lost():
    lengths = _int32(200, 200, 200)
    keys, values = _filled(FP32, 3, 2, 201, 16, lengths)
    keys[0, 0, 150, 3] = torch.nan
    values[1, 1, 7] = torch.nan
    y = cpu_step.decode_attention(torch.randn(3, 4, 16), keys, values, lengths, scale=1.0, window=0).view(3, 2, -1)
    assert y[0, 0].isnan().all()
    assert y[1, 1].isnan().all()
    assert y[2].isfinite().all()
    assert y[0, 1].isfinite().all()


def test_the_same_bits_with_any_number_of_threads():
    lengths = _int32(999, 3, 400)
    keys, values = _filled(BF16, 3, 2, 1000, 128, lengths)
    q = torch.randn(3, 8, 128).bfloat16()
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(cpu_step.decode_attention(q, keys, values, lengths, scale=0.1, window=0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@DTYPES
@pytest.mark.parametrize(("size", "rotary"), [(12, 12), (12, 6), (64, 64), (80, 40), (128, 128), (128, 2)])
def test_rotary(size, rotary, dtype):
    """Parts of one projection into a cache with heads beside positions; lengths outside of it write nothing."""
    lengths, heads, kv_heads, max_length = _int32(0, 8, -1, 9, 4, -(2**31), 2**31 - 1), 6, 3, 9
    joined = torch.randn(len(lengths), (heads + 2 * kv_heads) * size + 7).to(dtype)[:, 7:]
    q, k, v = joined.unflatten(1, (-1, size)).split((heads, kv_heads, kv_heads), 1)
    cos, sin = (torch.randn(max_length, rotary + 3).to(dtype)[:, :rotary] for _ in range(2))
    caches = [torch.full((8, max_length, kv_heads, size), torch.nan, dtype=dtype).transpose(1, 2) for _ in range(2)]
    y = cpu_step.rotary_append(q, k, v, cos, sin, lengths, *caches)
    at = lengths.clamp(0, max_length - 1)
    assert_one_rounding(y, reference_step.rotate(q, cos, sin, at))
    turned = reference_step.rotate(k, cos, sin, at)
    written = torch.zeros(8, max_length, dtype=torch.bool)
    for row in (0, 1, 4):
        written[row, at[row]] = True
        assert_one_rounding(caches[0][row, :, at[row]], turned[row])
        assert torch.equal(caches[1][row, :, at[row]], v[row])
    for cache in caches:
        assert torch.equal(cache.isnan().all(-1).all(1), ~written)
        assert torch.equal(cache.isnan().any(-1).any(1), ~written)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("features", [1, 15, 1024, 3001])
def test_gates(features, activation):
    for dtype in (BF16, FP32):
        gate_up = (4 * torch.randn(3, 2 * features + 1)).to(dtype)[:, 1:]
        y = cpu_step.gated(gate_up, activation=activation)
        assert y.dtype == dtype
        assert_one_rounding(y, reference_step.gated(gate_up, activation))


def test_the_exponential():
    """silu of float32 in every magnitude: a few units in the last place, zero and infinity where they belong."""
    x = torch.cat((torch.linspace(-87, 87, 200001), torch.logspace(-30, 1, 1000), -torch.logspace(-30, 1, 1000)))
    y = cpu_step.gated(torch.stack((x, torch.ones_like(x))).reshape(1, -1), activation="silu")[0]
    truth = torch.nn.functional.silu(x.double())
    assert ((y - truth).abs() / truth.abs()).nan_to_num().max() < 4 * 2**-23
    special = torch.tensor([[-1e30, -300.0, 300.0, torch.nan, torch.inf, 0.0] + [1.0] * 6])
    assert str(cpu_step.gated(special, activation="silu").tolist()) == "[[-0.0, -0.0, 300.0, nan, inf, 0.0]]"


@DTYPES
@pytest.mark.parametrize("features", [5, 64, 1030])
def test_norm_after_a_residual(features, dtype):
    """Rows of their own mixes, both inputs slices of wider ones, deltas in another dtype than the weight."""
    x, residual = (torch.randn(6, features + 9).to(dtype)[:, 2 : features + 2] for _ in range(2))
    weight, deltas = torch.randn(features).to(dtype), 0.3 * torch.randn(3, features)
    rest = (weight, deltas, _int32(4, 0, 2), torch.randn(8, 5), _int32(3))
    total, truth = reference_step.add_rms_norm(x, residual, *rest, eps=1e-5, offset=1.0)
    y = cpu_step.add_rms_norm(x, residual, *rest, eps=1e-5, offset=1.0)
    assert torch.equal(residual, total)
    assert_one_rounding(y, truth)


def test_what_is_not_compiled_goes_elsewhere():
    """float16, features that are not consecutive, and a cache of another dtype than the rotation."""
    lengths = _int32(3, 20)
    keys, values = (torch.randn(2, 2, 16, 40).transpose(2, 3) for _ in range(2))
    q = torch.randn(2, 4, 16)
    y = ops.decode_attention(q, keys, values, lengths, 0.3, 0, "cpp")
    _assert_attention(y, reference_step.decode_attention(q, keys, values, lengths, 0.3, 0))
    x = torch.randn(3, 20, dtype=FP16)
    assert_one_rounding(ops.gated(x, "silu", "cpp"), reference_step.gated(x, "silu"))
    cos, sin = torch.randn(2, 40, 16)
    run = prepared.attention(cos, sin, keys, values, scale=0.3, window=0, backend="cpp")
    k, v = torch.randn(2, 2, 2, 16)
    turned = reference_step.rotate(q, cos, sin, lengths).float()
    y = run(q, k, v, lengths)
    _assert_attention(y, reference_step.decode_attention(turned, keys, values, lengths, 0.3, 0))


@DTYPES
def test_prepared_calls_are_the_operators(dtype):
    lengths = _int32(3, 20)
    keys, values = _filled(dtype, 2, 2, 40, 16, lengths)
    copies = keys.clone(), values.clone()
    q, (k, v) = torch.randn(2, 4, 16).to(dtype), torch.randn(2, 2, 2, 16).to(dtype)
    cos, sin = torch.randn(2, 40, 16).to(dtype)
    y = prepared.attention(cos, sin, keys, values, scale=0.3, window=9, backend="cpp")(q, k, v, lengths)
    turned = ops.rotary_append(q, k, v, cos, sin, lengths, *copies, "cpp")
    assert torch.equal(y, ops.decode_attention(turned, *copies, lengths, 0.3, 9, "cpp"))
    assert torch.equal(keys.nan_to_num(), copies[0].nan_to_num())
    gate_up = torch.randn(3, 22).to(dtype)
    assert torch.equal(prepared.gated(gate_up, "gelu", "cpp")(gate_up), ops.gated(gate_up, "gelu", "cpp"))
    norm = (torch.randn(22).to(dtype), torch.randn(1, 22), _int32(0), torch.randn(1, 1), _int32(1))
    x, first, second = gate_up, gate_up.clone(), gate_up.clone()
    y = prepared.add_rms_norm(*norm, eps=1e-5, offset=0.0, backend="cpp")(x, first)
    assert torch.equal(y, ops.add_rms_norm(x, second, *norm, 1e-5, 0.0, "cpp"))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": (2, 2, 8, 12)}, "keys"),
        ({"keys": (1, 2, 8, 16)}, "keys"),
        ({"values": (2, 2, 7, 16)}, "values"),
        ({"keys": (2, 3, 8, 16)}, "divide"),
        ({"keys": (2, 2, 0, 16)}, "positions"),
        ({"y": (2, 4, 12)}, "y"),
        ({"lengths": (1,)}, "lengths"),
    ],
)
def test_the_kernel_reads_nothing_out_of_bounds(changes, message):
    shapes = {"q": (2, 4, 16), "keys": (2, 2, 8, 16), "values": (2, 2, 8, 16), "lengths": (2,), "y": (2, 4, 16)}
    tensors = {name: torch.zeros(changes.get(name, shape)) for name, shape in shapes.items()}
    tensors["lengths"] = tensors["lengths"].int()
    q, keys, values, lengths, y = tensors.values()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.alignvec.cpu_decode_attention(q, keys, values, lengths, 1.0, 0, y)
