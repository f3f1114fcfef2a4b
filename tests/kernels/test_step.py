"""The operators of a decode step against float64, in Triton, on csrc/cpu's side and in torch."""

import pytest
import torch

from alignvec import ops
from alignvec.errors import AlignvecError
from alignvec.kernels import attention, eager_step, reference_step
from tests.kernels.cases import BF16, CPP, DEVICE, FP16, FP32, assert_one_rounding, relative_error

ID = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}.get
BACKENDS = ["triton", "torch", *(["cpp"] if CPP else [])]
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=ID)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    empty = torch.empty

    def poisoned(*shape, **options):
        y = empty(*shape, **options)
        return y.fill_(torch.nan) if y.is_floating_point() else y

    monkeypatch.setattr(torch, "empty", poisoned)


def _normal(*shape, dtype=FP32):
    return torch.randn(*shape).to(DEVICE, dtype)


def _lengths(*lengths):
    return torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def _cache(dtype, cache_rows, kv_heads, max_length, size, lengths):
    """Keys and values with NaN in every slot that no row has filled."""
    keys, values = (_normal(cache_rows, kv_heads, max_length, size, dtype=dtype) for _ in range(2))
    empty = torch.ones(cache_rows, max_length, dtype=torch.bool, device=DEVICE)
    for row, length in enumerate(lengths.tolist()):
        empty[row, : length + 1] = False
    return [t.masked_fill_(empty[:, None, :, None], torch.nan) for t in (keys, values)]


def _norm_arguments(tokens, features, k, rows, dtype):
    x, residual = (_normal(tokens, 2 * features, dtype=dtype)[:, :features] for _ in range(2))
    deltas = 0.3 * _normal(k, features, dtype=FP32) if k else None
    columns = torch.randperm(k + 2)[:k].to(DEVICE, torch.int32)
    return x, residual, _normal(features, dtype=dtype), deltas, columns, _normal(8, k + 2), _lengths(rows)


@DTYPES
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "features", "k", "rows"), [(6, 33, 3, 3), (1, 130, 2, 1), (5, 40, 0, 2)])
def test_add_rms_norm(tokens, features, k, rows, backend, dtype):
    """(5, 40, 0, 2): without vectors, rows that do not divide the tokens do not matter."""
    x, residual, *rest = _norm_arguments(tokens, features, k, rows, dtype)
    for offset in (0.0, 1.0):
        total, truth = reference_step.add_rms_norm(x, residual, *rest, eps=1e-5, offset=offset)
        y = ops.add_rms_norm(x, residual, *rest, 1e-5, offset, backend)
        assert torch.equal(residual, total)
        assert y.dtype == dtype
        assert_one_rounding(y, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_without_vectors(backend):
    x, _, weight, deltas, *rest = _norm_arguments(5, 40, 0, 2, BF16)
    _, truth = reference_step.add_rms_norm(x, torch.zeros_like(x), weight, deltas, *rest, eps=1e-5)
    assert_one_rounding(ops.rms_norm(x, weight, deltas, *rest, 1e-5, 0.0, backend), truth)


# heads, kv_heads, D, rotary_dim
HEADS = [(6, 2, 16, 16), (5, 5, 80, 80), (8, 1, 96, 32), (4, 4, 64, 48)]


@DTYPES
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads", "size", "rotary"), HEADS)
def test_rotary_append(heads, kv_heads, size, rotary, backend, dtype):
    """Views of a joined projection; the first slot, the last, and lengths outside the cache, which write nothing."""
    lengths = _lengths(0, 6, -1, 7, 3, 200)
    rows, max_length = len(lengths), 7
    joined = _normal(rows, (heads + 2 * kv_heads) * size + 5, dtype=dtype)
    parts = joined[:, 5:].unflatten(1, (-1, size)).split((heads, kv_heads, kv_heads), 1)
    q, k, v = parts
    cos, sin = (_normal(max_length + 2, rotary, dtype=dtype) for _ in range(2))
    keys, values = (torch.full((rows + 1, kv_heads, max_length, size), torch.nan).to(DEVICE, dtype) for _ in range(2))
    y = ops.rotary_append(q, k, v, cos, sin, lengths, keys, values, backend)
    assert y.is_contiguous()
    assert y.dtype == dtype
    at = lengths.clamp(0, max_length - 1)
    assert_one_rounding(y, reference_step.rotate(q, cos, sin, at))
    truth = reference_step.rotate(k, cos, sin, at)
    written = torch.zeros(keys.shape[0], max_length, dtype=torch.bool, device=DEVICE)
    for row, length in enumerate(lengths.tolist()):
        if 0 <= length < max_length:
            written[row, length] = True
            assert_one_rounding(keys[row, :, length], truth[row])
            assert torch.equal(values[row, :, length], v[row])
    for cache in (keys, values):
        assert torch.equal(cache.isnan().all(-1).all(1), ~written)


def test_rotary_matches_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = _normal(3, 4, 16), _normal(3, 2, 16)
    angles = torch.arange(9)[:, None] * 0.3 ** torch.arange(8)
    cos, sin = (torch.cat((turn(angles),) * 2, 1).to(DEVICE) for turn in (torch.cos, torch.sin))
    lengths = _lengths(4, 0, 8)
    keys, values = (torch.zeros(3, 2, 9, 16, device=DEVICE) for _ in range(2))
    at = lengths.long()
    theirs = llama.apply_rotary_pos_emb(q[:, :, None], k[:, :, None], cos[at, None], sin[at, None])
    for backend in BACKENDS:
        y = ops.rotary_append(q, k, torch.zeros_like(k), cos, sin, lengths, keys, values, backend)
        torch.testing.assert_close(y, theirs[0][:, :, 0])
        torch.testing.assert_close(keys[torch.arange(3), :, at], theirs[1][:, :, 0])


def _assert_attention(y, truth, dtype):
    """As close as float32 sums of products whose weights are rounded to `dtype` are: two roundings at most."""
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert relative_error(y, truth) <= 1.5 * relative_error(truth.to(dtype), truth) + 2e-6


@DTYPES
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [0, 1, 50], ids=lambda window: f"window_{window}")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(6, 2, 64), (3, 3, 80), (20, 1, 96), (4, 1, 128), (2, 1, 256), (4, 2, 24)]
)
def test_decode_attention(heads, kv_heads, size, window, backend, dtype):
    """Lengths of every kind, NaN in all that is not filled, and a cache with more rows, as a slice of a larger one."""
    lengths, max_length = _lengths(0, 130, 63, 64, 130, 7), 131
    keys, values = _cache(dtype, len(lengths) + 1, kv_heads, max_length, size, lengths)
    if window:  # what lies before the window is not read either
        for row, length in enumerate(lengths.tolist()):
            for cache in (keys, values):
                cache[row, :, : max(0, length + 1 - window)] = torch.nan
    values = torch.cat((values, values), 3)[..., :size]  # a row stride of its own
    q = _normal(len(lengths), heads + 1, size, dtype=dtype)[:, 1:]
    y = ops.decode_attention(q, keys, values, lengths, 0.2, window, backend)
    assert y.shape == (len(lengths), heads * size)
    _assert_attention(y, reference_step.decode_attention(q, keys, values, lengths, 0.2, window), dtype)


@pytest.mark.parametrize("window", [0, 100], ids=lambda window: f"window_{window}")
@pytest.mark.parametrize("splits", [1, 2, 5, 19])
def test_any_split_of_the_keys(splits, window, monkeypatch):
    """Up to a split for every block, more than are added up at a time; twice the same bits."""
    monkeypatch.setattr(attention, "COMBINED", 16 * 256)
    lengths = _lengths(0, 299, 150, 8)
    keys, values = _cache(FP32, 4, 2, 300, 256, lengths)
    q = 4 * _normal(4, 4, 256)
    y, again = (
        attention.decode_attention(q, keys, values, lengths, scale=0.1, window=window, splits=splits) for _ in range(2)
    )
    _assert_attention(y, reference_step.decode_attention(q, keys, values, lengths, 0.1, window), FP32)
    assert torch.equal(y, again)


def test_splits_of_bfloat16_agree():
    lengths = _lengths(500, 63)
    keys, values = _cache(BF16, 2, 1, 512, 64, lengths)
    q = _normal(2, 7, 64, dtype=BF16)
    truth = reference_step.decode_attention(q, keys, values, lengths, 0.125, 0)
    for splits in (1, 3, 4):
        y = attention.decode_attention(q, keys, values, lengths, scale=0.125, window=0, splits=splits)
        _assert_attention(y, truth, BF16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_score_in_any_block_counts(backend):
    """The running maximum: scores of hundreds, whose exponentials would overflow, early, late and negative."""
    lengths = _lengths(399, 399, 399)
    keys, values = _cache(FP32, 3, 1, 400, 64, lengths)
    q = torch.ones(3, 2, 64, device=DEVICE)
    keys[0, 0, 3], keys[1, 0, 398], keys[2] = 5.0, 5.0, -5.0
    y = ops.decode_attention(q, keys, values, lengths, 1.0, 0, backend)
    _assert_attention(y, reference_step.decode_attention(q, keys, values, lengths, 1.0, 0), FP32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_outside_the_cache_are_the_nearest_inside(backend):
    keys, values, q = _normal(3, 1, 40, 64), _normal(3, 1, 40, 64), _normal(3, 2, 64)
    y = ops.decode_attention(q, keys, values, _lengths(-1, 40, 2**31 - 1), 0.2, 0, backend)
    truth = reference_step.decode_attention(q, keys, values, _lengths(0, 39, 39), 0.2, 0)
    _assert_attention(y, truth, FP32)


@pytest.mark.parametrize("window", [0, 50], ids=lambda window: f"window_{window}")
def test_torch_without_reading_lengths(window):
    """What devices other than CPUs run: the whole cache under a mask."""
    lengths = _lengths(0, 130, 63, 7)
    keys, values = _cache(FP32, 4, 2, 131, 24, lengths)
    q = _normal(4, 6, 24)
    y = eager_step.attend_masked(q.view(4, 2, 3, 24), keys, values, lengths, 0.2, window).reshape(4, -1)
    _assert_attention(y, reference_step.decode_attention(q, keys, values, lengths, 0.2, window), FP32)


@pytest.mark.filterwarnings("ignore:overflow")  # of e^-g in the interpreter, whose quotient is 0 as it should be
@DTYPES
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated(activation, backend, dtype):
    gate_up = (3 * _normal(5, 2 * 1100 + 3, dtype=FP32)).to(dtype)[:, 1:-2]
    gate_up[0, :5] = torch.tensor([100.0, -100.0, 30.0, -30.0, 0.0])
    y = ops.gated(gate_up, activation, backend)
    assert y.dtype == dtype
    assert_one_rounding(y, reference_step.gated(gate_up, activation))


def _arguments():
    """Of each operator, what it takes; torch's own checks run on CPU tensors."""
    dtype = FP32
    lengths = _lengths(3, 0)
    q, k, v = _normal(2, 4, 16, dtype=dtype), _normal(2, 2, 16, dtype=dtype), _normal(2, 2, 16, dtype=dtype)
    cos, sin, keys, values = _normal(8, 16), _normal(8, 16), _normal(3, 2, 8, 16), _normal(3, 2, 8, 16)
    return {
        "add_rms_norm": (*(t.contiguous() for t in _norm_arguments(6, 33, 3, 3, dtype)), 1e-5, 0.0, "torch"),
        "rotary_append": (q, k, v, cos, sin, lengths, keys, values, "torch"),
        "decode_attention": (q, keys, values, lengths, 0.25, 4, "torch"),
        "gated": (_normal(3, 10), "silu", "torch"),
    }


@pytest.mark.parametrize("name", ["add_rms_norm", "rotary_append", "decode_attention", "gated"])
def test_torch_accepts_the_operator(name, monkeypatch):
    monkeypatch.undo()
    torch.library.opcheck(getattr(torch.ops.alignvec, name).default, _arguments()[name])


def _replaced(arguments, **changes):
    return [changes.get(str(i), value) for i, value in enumerate(arguments)]


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("add_rms_norm", 0, torch.zeros(5, 33), "residual"),
        ("add_rms_norm", 1, torch.zeros(33, 6).t(), "contiguous"),
        ("rotary_append", 1, torch.zeros(2, 4, 16), r"k \[2, 4, 16\]"),
        ("rotary_append", 3, torch.zeros(7, 16), r"cos \[7, 16\]"),
        ("rotary_append", 5, torch.zeros(2, dtype=torch.int64), "int32"),
        ("rotary_append", 6, torch.zeros(1, 2, 8, 16), r"keys \[1, 2, 8, 16\]"),
        ("decode_attention", 0, torch.zeros(2, 3, 16), r"q \[2, 3, 16\]"),
        ("decode_attention", 0, torch.zeros(2, 4, 16, dtype=BF16), "one dtype"),
        ("decode_attention", 3, torch.zeros(3, dtype=torch.int32), r"lengths \[3\]"),
        ("decode_attention", 5, -1, "window"),
        ("gated", 0, torch.zeros(3, 9), "9 features"),
        ("gated", 1, "relu", "relu"),
    ],
)
def test_what_does_not_fit_is_refused(name, position, value, message):
    arguments = _replaced(_arguments()[name], **{str(position): value.to(DEVICE) if torch.is_tensor(value) else value})
    before = [t.clone() for t in arguments if torch.is_tensor(t)]
    with pytest.raises(AlignvecError, match=message):
        getattr(ops, name)(*arguments)
    assert all(torch.equal(*pair) for pair in zip(before, filter(torch.is_tensor, arguments), strict=True))
