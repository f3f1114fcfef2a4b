"""Norms in Triton against float64, and at coefficient 0 against those of transformers and torch."""

import pytest
import torch
from torch import nn

from alignvec.errors import AlignvecError
from alignvec.kernels import reference
from alignvec.kernels.norm import layer_norm, rms_norm
from tests.kernels.cases import BF16, DEVICE, FP16, FP32, assert_one_rounding

ID = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}.get
ROWS = [1, 3, "random"]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))


def _make(tokens, features, k, dtype, rows, delta=None):
    """x, weight, bias, deltas, bias_deltas, then columns, table, rows, token_rows."""
    x = (3 * torch.randn(tokens, features) + 1).to(dtype)
    weight, bias = torch.randn(2, features).to(dtype)
    deltas, bias_deltas = (0.3 * torch.randn(2, k, features)).to(delta or dtype)
    columns = torch.randperm(k + 2)[:k].to(torch.int32)
    used = torch.tensor([1 if rows == "random" else rows], dtype=torch.int32)
    token_rows = torch.randint(8, (tokens,), dtype=torch.int32).to(DEVICE) if rows == "random" else None
    tensors = (x, weight, bias, deltas, bias_deltas, columns, torch.randn(8, k + 2), used)
    return (*(t.to(DEVICE) for t in tensors), token_rows)


def _truth(x, weight, bias, deltas, bias_deltas, columns, table, rows, token_rows, *, eps, offset=0.0, centre=False):
    c = reference.token_coefficients(table, rows, columns, x.shape[0], token_rows).double()
    x = x.double()
    if centre:
        x = x - x.mean(1, keepdim=True)
    y = x / (x.square().mean(1, keepdim=True) + eps).sqrt()
    y = y * (weight.double() + offset + c @ deltas.double())
    return y if bias is None else y + bias.double() + c @ bias_deltas.double()


@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: f"rows_{rows}")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=ID)
@pytest.mark.parametrize(("tokens", "features", "k"), [(6, 33, 3), (12, 128, 8), (3, 1100, 1), (6, 40, 16)])
def test_rms_norm(tokens, features, k, dtype, rows):
    x, weight, _, deltas, _, *rest = _make(tokens, features, k, dtype, rows)
    for offset in (0.0, 1.0):
        y = rms_norm(x, weight, deltas, *rest, eps=1e-5, offset=offset)
        assert y.dtype == dtype
        assert_one_rounding(y, _truth(x, weight, None, deltas, None, *rest, eps=1e-5, offset=offset))


@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: f"rows_{rows}")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=ID)
@pytest.mark.parametrize(("tokens", "features", "k"), [(6, 33, 3), (12, 128, 8), (3, 1100, 1)])
def test_layer_norm(tokens, features, k, dtype, rows):
    args = _make(tokens, features, k, dtype, rows, FP32 if features == 33 else None)
    assert_one_rounding(layer_norm(*args, eps=1e-5), _truth(*args, eps=1e-5, centre=True))


def test_layer_norm_without_some_parameters():
    x, weight, bias, deltas, bias_deltas, *rest = _make(6, 33, 3, BF16, 3)
    options = {"eps": 1e-5, "centre": True}
    y = layer_norm(x, weight, None, deltas, None, *rest, eps=1e-5)
    assert_one_rounding(y, _truth(x, weight, None, deltas, None, *rest, **options))
    y = layer_norm(x, weight, bias, None, bias_deltas, *rest, eps=1e-5)
    assert_one_rounding(y, _truth(x, weight, bias, 0 * deltas, bias_deltas, *rest, **options))


def test_strided_activations():
    x, weight, _, deltas, _, *rest = _make(6, 66, 3, BF16, 3)
    half = x[:, :33]
    y = rms_norm(half, weight[:33], deltas[:, :33], *rest, eps=1e-5)
    assert torch.equal(y, rms_norm(half.clone(), weight[:33], deltas[:, :33].clone(), *rest, eps=1e-5))


def _module(name, features, dtype):
    if name == "LayerNorm":
        return nn.LayerNorm(features, device=DEVICE, dtype=dtype)
    if name == "RMSNorm":
        return nn.RMSNorm(features, eps=1e-5, device=DEVICE, dtype=dtype)
    package = pytest.importorskip(f"transformers.models.{name.removesuffix('RMSNorm').lower()}")
    module = getattr(package, f"modeling_{name.removesuffix('RMSNorm').lower()}")
    return getattr(module, name)(features, eps=1e-5).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=ID)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "MistralRMSNorm", "LlamaRMSNorm", "Gemma2RMSNorm"])
def test_base_agrees_with_the_model(name, dtype):
    """At coefficient 0, no further from the module's result than what the module itself rounds away."""
    x, weight, bias, deltas, bias_deltas, columns, table, *rest = _make(12, 96, 3, dtype, 3)
    module = _module(name, 96, dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
        if name == "LayerNorm":
            module.bias.copy_(bias)
    table.zero_()
    rest = (columns, table, *rest)
    if name == "LayerNorm":
        y = layer_norm(x, weight, bias, deltas, bias_deltas, *rest, eps=1e-5)
        truth = _truth(x, weight, bias, deltas, bias_deltas, *rest, eps=1e-5, centre=True)
    else:
        offset = float(name.startswith("Gemma"))
        y = rms_norm(x, weight, deltas, *rest, eps=1e-5, offset=offset)
        truth = _truth(x, weight, None, deltas, None, *rest, eps=1e-5, offset=offset)
    theirs = module(x)
    assert theirs.dtype == y.dtype
    ulp = torch.finfo(dtype).eps
    # Both round the result, by half a place each; Llama's and Mistral's round the normalised x before.
    places = 1.5 if name in ("MistralRMSNorm", "LlamaRMSNorm") else 1.0
    slack = 4 * torch.finfo(FP32).eps * (truth.abs().max() if name == "LayerNorm" else truth.abs())
    subnormal = torch.finfo(dtype).smallest_normal * ulp
    assert ((y.double() - theirs.double()).abs() <= places * ulp * truth.abs() + slack + subnormal).all()
    assert (y.double() - truth).norm() <= 1.001 * (theirs.double() - truth).norm() + 5e-8 * truth.norm()


def test_later_writes_are_read():
    x, weight, _, deltas, _, columns, table, rows, _ = _make(6, 33, 3, BF16, 3)
    args = (columns, table, rows, None)
    rms_norm(x, weight, deltas, *args, eps=1e-5)
    table.neg_()
    rows.fill_(2)
    y = rms_norm(x, weight, deltas, *args, eps=1e-5)
    assert_one_rounding(y, _truth(x, weight, None, deltas, None, *args, eps=1e-5))


def test_rows_that_do_not_divide_give_nan():
    x, weight, bias, deltas, bias_deltas, *rest = _make(6, 33, 3, BF16, 4)
    assert rms_norm(x, weight, deltas, *rest, eps=1e-5).isnan().all()
    assert layer_norm(x, weight, bias, deltas, bias_deltas, *rest, eps=1e-5).isnan().all()


def test_too_many_vectors_are_refused():
    x, weight, _, deltas, _, *rest = _make(6, 33, 17, BF16, 1)
    with pytest.raises(AlignvecError, match="17 vectors"):
        rms_norm(x, weight, deltas, *rest, eps=1e-5)
