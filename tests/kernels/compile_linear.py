"""Compile cases of the linear operator, on Mistral-7B's fused gate and up projection unless told otherwise."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch

from alignvec.kernels import linear, tiling
from tests.kernels.compile_small import BF16, FP16, FP32, coefficients, integers, meta, operand
from tests.kernels.cross_compile import Case


def _run(
    target: str,
    execution: str,
    tokens: int,
    names: list[str],
    dtype: torch.dtype = BF16,
    delta: torch.dtype | None = None,
    precision: str = "exact",
    token_rows: bool = False,
    bias: bool = False,
    transposed: bool = False,
    out_features: int = 28672,
    in_features: int = 4096,
) -> Any:
    weight = meta(out_features, in_features, dtype=dtype)
    if transposed:
        weight = weight.view(in_features, out_features).t()
    vectors = [operand(name, out_features, in_features, delta or dtype) for name in names]
    if transposed:
        vectors = [operand(name, in_features, out_features, delta or dtype).transpose() for name in names]
    columns, table, rows = coefficients(len(names))
    biases = (meta(out_features, dtype=dtype), meta(len(names), out_features, dtype=dtype)) if bias else (None, None)
    hip = target.startswith("gfx")
    with (
        mock.patch.object(tiling, "split_config", functools.partial(tiling.split_config, hip=hip)),
        mock.patch.object(tiling, "has_wgmma", return_value=target in ("sm_90", "sm_100")),
        mock.patch.object(tiling, "combine_config", functools.partial(tiling.combine_config, hip=hip)),
    ):
        linear.linear(
            meta(tokens, in_features, dtype=dtype),
            weight,
            biases[0],
            vectors,
            biases[1],
            columns,
            table,
            rows,
            integers(tokens) if token_rows else None,
            execution=execution,
            precision=precision,
        )


def _case(
    name: str,
    execution: str,
    tokens: int,
    names: list[str],
    *args: Any,
    matrix: str = "small",
    registers: int | None = None,
    spills: int = 8,
    **options: Any,
) -> Case:
    """Dense vectors leave room for three blocks of 128 threads at least while decoding, words that wait for two."""
    registers = registers or (255 if tokens > 16 else 160)
    return Case(
        name, lambda target: _run(target, execution, tokens, names, *args, **options), registers, matrix, spills
    )


CASES = [
    _case("split-m16-dense-k3-narrow", "split", 16, ["dense"] * 3, out_features=1024),
    _case("split-m16-dense-k3-delta-fp32-bias", "split", 16, ["dense"] * 3, delta=FP32, bias=True),
    _case("split-m16-dense-k16-token_rows", "split", 16, ["dense"] * 16, token_rows=True),
    _case("split-m64-dense-k8-bias-transposed", "split", 64, ["dense"] * 8, bias=True, transposed=True, matrix="large"),
    _case("split-m16-dense-k3-fp16-delta-fp32", "split", 16, ["dense"] * 3, FP16, FP32),
    _case("split-m16-dense-k3-fp32", "split", 16, ["dense"] * 3, FP32, matrix=""),
    _case("split-m2048-dense-k1", "split", 2048, ["dense"], matrix="large"),
    _case("combine-m2048-dense-k3", "combine", 2048, ["dense"] * 3, matrix="large"),
    _case(
        "combine-m2048-dense-k3-merged-bias",
        "combine",
        2048,
        ["dense"] * 3,
        precision="merged",
        bias=True,
        matrix="large",
    ),
    _case("combine-m2048-dense-k16-token_rows", "combine", 2048, ["dense"] * 16, token_rows=True, matrix="large"),
    _case("combine-m2048-dense-k3-fp16", "combine", 2048, ["dense"] * 3, FP16),
    _case("combine-m2048-dense-k3-fp32", "combine", 2048, ["dense"] * 3, FP32, matrix=""),
]
DECODED = ("int:8", "int:4", "sign:1", "lossless:2", "lossless:4", "lossless:8", "sparse", "low-rank")
MIXED = ["int:4", "sign:1", "sparse", "dense", "lossless:4", "low-rank"]
CASES += [
    *(_case(f"split-m16-{name.replace(':', '')}-k3", "split", 16, [name] * 3, registers=240) for name in DECODED),
    *(
        _case(f"combine-m2048-{name.replace(':', '')}-k3", "combine", 2048, [name] * 3, matrix="large")
        for name in DECODED
    ),
    _case("split-m16-sign1-k8", "split", 16, ["sign:1"] * 8, registers=220),
    _case("split-m16-int4-k16-fp16-bias", "split", 16, ["int:4"] * 16, FP16, bias=True, registers=264),
    _case("split-m64-int4-k3", "split", 64, ["int:4"] * 3, matrix="large"),
    _case("split-m16-int4-k3-fp32", "split", 16, ["int:4"] * 3, FP32, matrix="", registers=255),
    _case("split-m16-mixed-k6", "split", 16, MIXED, registers=210),
    _case(
        "split-m64-mixed-k6-bias", "split", 64, MIXED, bias=True, matrix="large", spills=80
    ),  # on Blackwell, at 128 registers
    _case(
        "combine-m2048-mixed-k6-merged-bias",
        "combine",
        2048,
        MIXED,
        precision="merged",
        bias=True,
        matrix="large",
        registers=264,
    ),
]
