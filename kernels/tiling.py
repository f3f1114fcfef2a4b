"""Which tiles a launch takes: those of the GPU's tuned table, or a choice by shape for any GPU since sm_80."""

from __future__ import annotations

import functools

import torch
import triton

from alignvec.kernels.configs import Config

# Up to here the weights' bytes bound a layer, not its FLOPs, and "auto" splits.
DECODE_TOKENS = 64

# Programs that keep the memory of a large chip busy; fewer are multiplied by splitting in_features.
PROGRAMS = 256


@functools.cache
def has_wgmma(device: torch.device) -> bool:
    """Whether the device is NVIDIA's Hopper or later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.lru_cache(4096)
def split_config(
    tokens: int,
    out_features: int,
    in_features: int,
    k: int,
    dtype: torch.dtype,
    weights: torch.dtype,
    width: int = 0,
    plain: bool = True,
    hip: bool = torch.version.hip is not None,
    wgmma: bool = False,
) -> Config:
    """The launch of `split` for activations [tokens, in_features] of `dtype`, a base and `k` vectors up to `weights`.

    k: vectors of an entry. width: of the bit planes that vectors lie in, if any do. plain: none is decoded. wgmma: big
    products read shared memory by themselves, which leaves registers. Tiles read full 128-byte lines of the weights.
    The sums, and the words that wait for their plane, stay under about 128 registers a thread and stages under 96 KiB
    of shared memory (64 on AMD), so that two blocks share a multiprocessor.
    """
    shared = 64 << 10 if hip else 96 << 10
    itemsize = dtype.itemsize if dtype == weights else 4
    block_k = width or 128 // itemsize
    warps = 4
    if k == 1 and tokens > DECODE_TOKENS and itemsize == 2 and not width:
        block_m, block_n, block_k, warps = 128, 128 if wgmma else 64, 32, 8
    else:
        block_m = min(max(triton.next_power_of_2(tokens), 16), 32 if itemsize == 4 else 64)
        block_n = 64 if k <= 1 else 32
        if not plain and (dtype == torch.float32 or (block_m == 64 and not wgmma)):
            block_n = 16
        warps = 8 if block_m == 64 or dtype == torch.float32 or not (plain or wgmma or hip) else 4
    loaded = 1 if width else k + 1
    stage = (loaded * block_n + block_m) * block_k * itemsize
    # One of the stages is in registers, unless the matrix instruction reads shared memory by itself.
    stages = max(2, min(3 if block_m == 64 and not plain else 4, shared // stage + (block_m < 64)))
    programs = triton.cdiv(tokens, block_m) * triton.cdiv(out_features, block_n)
    split_k = 1
    while programs * split_k < PROGRAMS and in_features >= 8 * block_k * split_k:
        split_k *= 2
    return Config(block_m, block_n, block_k, warps, stages, split_k)


@functools.lru_cache(4096)
def combine_config(
    k: int, dtype: torch.dtype, weights: torch.dtype, plain: bool = True, hip: bool = torch.version.hip is not None
) -> Config:
    """The launch of `combine` for activations of `dtype` and a base and `k` vectors of up to `weights`.

    plain: all vectors are dense; others take registers.
    """
    shared = 64 << 10 if hip else 96 << 10
    itemsize = dtype.itemsize if dtype == weights else 4
    block_m, block_k = 128, 32
    block_n = 128 if k <= 4 and plain else 64 if k <= 8 else 32
    if dtype == torch.float32:  # sums of ordinary arithmetic: a product's operands are in registers
        block_m, block_n, block_k = 64, min(block_n, 64), 16
    elif itemsize == 4 or dtype == torch.float16:  # float32 in shared memory, and an x that is converted
        block_m, block_n = 32, min(block_n, 64)
    stage = ((1 + k * (1 if plain else 8 // itemsize)) * block_n + block_m) * block_k * itemsize  # words and scales
    return Config(block_m, block_n, block_k, 8, max(2, min(3, shared // stage + 1)))
