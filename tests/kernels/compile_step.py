"""Compile cases of a decode step's operators on the shapes of Mistral-7B, and attention on other sizes of head."""

from __future__ import annotations

import torch
from torch import Tensor

from alignvec.kernels.attention import decode_attention
from alignvec.kernels.gate import gated
from alignvec.kernels.norm import add_rms_norm
from alignvec.kernels.rotary import rotary_append
from tests.kernels.compile_small import BF16, FP16, FP32, case, coefficients, integers, meta

ROWS, POSITIONS = 16, 32768


def _cache(kv_heads: int, size: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    keys, values = (meta(ROWS, kv_heads, POSITIONS, size, dtype=dtype) for _ in range(2))
    return keys, values


def _attention(size: int, splits: int, dtype: torch.dtype = BF16, heads: int = 32, kv_heads: int = 8) -> Tensor:
    q, cache = meta(ROWS, heads, size, dtype=dtype), _cache(kv_heads, size, dtype)
    return decode_attention(q, *cache, integers(ROWS), scale=0.1, window=4096, splits=splits)


def _rotary(size: int, rotary: int) -> Tensor:
    parts = meta(ROWS, 32 + 8 + 8, size).split((32, 8, 8), 1)
    return rotary_append(*parts, meta(POSITIONS, rotary), meta(POSITIONS, rotary), integers(ROWS), *_cache(8, size))


def _add_rms_norm(tokens: int, k: int) -> Tensor:
    deltas = meta(k, 4096) if k else None
    return add_rms_norm(meta(tokens, 4096), meta(tokens, 4096), meta(4096), deltas, *coefficients(k), eps=1e-5)


def _gated(activation: str) -> Tensor:
    return gated(meta(ROWS, 2 * 14336), activation=activation)


CASES = [
    # Three blocks of 128 threads at least run together; AMD's compiler takes more registers where it has them.
    *(case(f"attention-{size}", _attention, size, 9, registers=168, matrix="small") for size in (80, 96, 128)),
    *(case(f"attention-{size}", _attention, size, 9, registers=216, matrix="small") for size in (64, 256)),
    case("attention-128-one-split", _attention, 128, 1, registers=168, matrix="small"),
    case("attention-128-fp16", _attention, 128, 9, FP16, registers=168, matrix="small"),
    case("attention-128-fp32", _attention, 128, 9, FP32),
    case("attention-128-one-kv-head", _attention, 128, 9, heads=71, kv_heads=1, registers=168, matrix="small"),
    case("rotary-128", _rotary, 128, 128, registers=64),
    case("rotary-80-of-which-32", _rotary, 80, 32, registers=64),
    *(case(f"gated-{activation}", _gated, activation, registers=64) for activation in ("silu", "gelu", "gelu_tanh")),
    case("add_rms_norm-16x4096-k3", _add_rms_norm, 16, 3, registers=128),
    case("add_rms_norm-1x4096-k0", _add_rms_norm, 1, 0, registers=128),
]
