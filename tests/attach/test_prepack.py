"""Operands made of stored deltas say what the stored deltas say."""

from __future__ import annotations

import pytest
import torch

from alignvec import formats, prepack
from alignvec.kernels.operands import decode

CPU = torch.device("cpu")
KINDS = {
    "dense": "dense",
    "int8:group=32": "codes",
    "int8:group=128": "codes",
    "int4:group=32": "codes",
    "int4:group=64": "codes",
    "sign": "codes",
    "sign:group=64": "codes",
    "lossless": "lossless",
    "sparse:density=0.2": "sparse",
    "sparse:density=0.2,method=dare": "sparse",
    "low-rank:rank=5": "low-rank",
    "low-rank:rank=5,dtype=float32": "low-rank",
}
SHAPES = [(7, 33), (5, 130), (1, 1), (3, 4, 40)]


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    base = torch.randn(shape).to(dtype)
    aligned = (base.float() * (1 + 0.02 * torch.randn(shape))).to(dtype)
    aligned.view(-1)[::11] *= -2  # far: the side table's
    return base, aligned


def encode(name: str, base: torch.Tensor, aligned: torch.Tensor) -> formats.Encoded:
    return formats.encode(name, aligned.float() - base.float(), base, "w", aligned=aligned)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_format(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, aligned = pair(shape, dtype)
    encoded = encode(name, base, aligned)
    parts = {key: part.clone() for key, part in encoded.parts.items()}
    operand = prepack.operand(encoded, base, CPU)
    assert operand.kind == KINDS[name]
    truth = formats.decode(encoded, base).float().view(-1, shape[-1])
    torch.testing.assert_close(decode(operand, base.view(-1, shape[-1])), truth, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(part, parts[key]) for key, part in encoded.parts.items()), "the vector's own are not written"


@pytest.mark.parametrize("name", KINDS)
def test_of_a_transposed_weight(name: str) -> None:
    """As Conv1D multiplies: factors stay factors, all else that is not dense becomes it."""
    base, aligned = pair((7, 33))
    encoded = encode(name, base, aligned)
    operand = prepack.operand(encoded, base, CPU, transposed=True)
    assert operand.kind == ("low-rank" if "low-rank" in name else "dense")
    assert operand.shape == (33, 7)
    truth = formats.decode(encoded, base).float().t()
    torch.testing.assert_close(decode(operand), truth, rtol=1e-6, atol=1e-7)


def test_lossless_of_a_wider_weight_is_dense_and_as_narrow_as_is_exact() -> None:
    base, aligned = pair((7, 33))
    close = torch.where((aligned.float() / base.float() - 1).abs() < 0.1, aligned, base)
    for other, dtype in ((close, torch.bfloat16), (aligned, torch.float32)):
        encoded = encode("lossless", base, other)
        operand = prepack.operand(encoded, base.float(), CPU)
        assert operand.parts[0].dtype == dtype
        assert torch.equal(decode(operand), other.float() - base.float())


def test_sparse_rows_too_long_for_16_bit_offsets_are_dense() -> None:
    for inputs, kind in ((65535, "sparse"), (65536, "dense")):
        base = torch.zeros(2, inputs, dtype=torch.bfloat16)
        aligned = torch.randn(2, inputs).bfloat16()
        encoded = encode("sparse:density=1.0", base, aligned)
        operand = prepack.operand(encoded, base, CPU)
        assert operand.kind == kind
        assert torch.equal(decode(operand), aligned.float())


def test_a_parameter_of_one_dimension() -> None:
    base, aligned = pair((40,))
    encoded = encode("int4", base, aligned)
    assert torch.equal(prepack.dense(encoded, base, CPU).float(), aligned.float() - base.float())
