"""Compile cases of materialise, embedding and norms on the shapes of Mistral-7B."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alignvec.kernels import operands
from alignvec.kernels.embedding import embedding
from alignvec.kernels.materialise import materialise
from alignvec.kernels.norm import layer_norm, rms_norm
from alignvec.kernels.operands import Operand
from tests.kernels.cross_compile import Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


integers = functools.partial(meta, dtype=torch.int32)


def operand(name: str, out_features: int, in_features: int, dtype: torch.dtype = BF16) -> Operand:
    """An operand on the meta device: dense, low-rank (of rank 64), sparse, or `kind:bits` with groups of 128."""
    kind, _, bits = name.partition(":")
    shape = (out_features, in_features)
    if kind == "dense":
        return operands.dense(meta(*shape, dtype=dtype))
    if kind == "low-rank":
        return operands.low_rank(meta(64, in_features, dtype=dtype), meta(out_features, 64, dtype=dtype))
    starts, some = integers(out_features + 1), 1000
    if kind == "sparse":
        bitmap = integers(out_features, in_features // 32)
        return Operand(kind, (bitmap, bitmap.to(torch.int16), starts, meta(some, dtype=dtype)), shape)
    words = integers(out_features, in_features * int(bits) // 32)
    if kind == "lossless":
        side = (starts, integers(some), meta(some, dtype=dtype), integers(some))
        return Operand(kind, (words, *side), shape, int(bits), 64)
    if bits == "1":
        return Operand("codes", (words, meta(out_features, 1, dtype=FP32)), shape, 1, 64)
    return Operand("codes", (words, meta(out_features, in_features // 128)), shape, int(bits), 64, 128)


def coefficients(k: int) -> tuple[Tensor, Tensor, Tensor]:
    """columns, table, rows."""
    return integers(k), meta(8, k + 1, dtype=FP32), integers(1)


def _materialise(names: list[str], dtype: torch.dtype = BF16, pair: bool = False, transposed: bool = False) -> Any:
    weight, out, low = (meta(14336, 4096, dtype=dtype) for _ in range(3))
    if transposed:
        weight, out, low = (t.view(4096, 14336).t() for t in (weight, out, low))
    vectors = [operand(name, *weight.shape, dtype) for name in names]
    return materialise(weight, vectors, *coefficients(len(names)), out=out, low=low if pair else None)


def _embedding(names: list[str], tokens: int) -> Any:
    vectors = [operand(name, 32768, 4096) for name in names]
    return embedding(meta(tokens, dtype=torch.int64), meta(32768, 4096), vectors, *coefficients(len(names)))


def _rms_norm(tokens: int, features: int, k: int, dtype: torch.dtype = BF16) -> Any:
    tensors = (meta(*shape, dtype=dtype) for shape in ((tokens, features), (features,), (k, features)))
    return rms_norm(*tensors, *coefficients(k), eps=1e-5)


def _layer_norm(tokens: int, features: int, k: int) -> Any:
    tensors = (meta(*shape) for shape in ((tokens, features), *((features,),) * 2, *((k, features),) * 2))
    return layer_norm(*tensors, *coefficients(k), eps=1e-5)


def case(name: str, run: Callable[..., Any], *args: Any, registers: int = 255, matrix: str = "", **options: Any):
    return Case(name, lambda target: run(*args, **options), registers, matrix)


CASES = [
    # Three blocks of 128 threads at least run together, so that enough loads are under way.
    case("materialise-dense-k3", _materialise, ["dense"] * 3, registers=128),
    case("materialise-dense-k16", _materialise, ["dense"] * 16, registers=168),
    case("materialise-dense-k3-fp32", _materialise, ["dense"] * 3, FP32, registers=168),
    case("materialise-dense-k3-pair", _materialise, ["dense"] * 3, pair=True, registers=128),
    case("materialise-dense-k3-fp16-pair", _materialise, ["dense"] * 3, FP16, pair=True, registers=168),
    case("materialise-dense-k3-transposed", _materialise, ["dense"] * 3, transposed=True, registers=128),
    case("materialise-int8-k3", _materialise, ["int:8"] * 3, registers=128),
    case("materialise-int4-k3", _materialise, ["int:4"] * 3, registers=128),
    case("materialise-int4-k16", _materialise, ["int:4"] * 16),
    case("materialise-sign-k3", _materialise, ["sign:1"] * 3, registers=128),
    case("materialise-sign-k8", _materialise, ["sign:1"] * 8, registers=168),
    case("materialise-lossless4-k3", _materialise, ["lossless:4"] * 3, registers=168),
    case("materialise-lossless8-k3", _materialise, ["lossless:8"] * 3, registers=168),
    case("materialise-lossless4-k3-transposed", _materialise, ["lossless:4"] * 3, transposed=True),
    case("materialise-sparse-k3", _materialise, ["sparse"] * 3, registers=168),
    case("materialise-low-rank-k3", _materialise, ["low-rank"] * 3, matrix="large"),
    case("materialise-mixed-k4", _materialise, ["int:4", "sign:1", "sparse", "dense"], registers=168),
    case("materialise-mixed-k6", _materialise, ["int:4", "sign:1", "sparse", "dense", "lossless:4", "low-rank"]),
    case("embedding-dense-k3", _embedding, ["dense"] * 3, 16, registers=128),
    case("embedding-mixed-k6", _embedding, ["int:4", "sign:1", "sparse", "dense", "lossless:4", "low-rank"], 4096),
    case("rms_norm-16x4096-k3", _rms_norm, 16, 4096, 3, registers=128),
    case("rms_norm-65536x128-k3", _rms_norm, 65536, 128, 3, registers=128),
    case("rms_norm-4096x4096-k16", _rms_norm, 4096, 4096, 16, registers=128),
    case("rms_norm-16x16384-k3", _rms_norm, 16, 16384, 3),
    case("layer_norm-4096x4096-k3", _layer_norm, 4096, 4096, 3, registers=168),
]
