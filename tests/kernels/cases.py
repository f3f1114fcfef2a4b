"""Random arguments of the kernels with operands of every kind, the implementations, and the tests' error measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alignvec import compiled
from alignvec.kernels import eager, linear, operands
from alignvec.kernels.configs import Config
from alignvec.kernels.operands import Operand

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# One large tile where the interpreter runs them, the shipped choice where a GPU does.
TILE = Config(16, 64, 128, 4, 2) if DEVICE == "cpu" else None
SPLIT_3 = Config(16, 32, 32, 4, 2, split_k=3)

FORMATS = (
    "dense",
    "int8:128",
    "int8:32",
    "int4:128",
    "int4:32",
    "sign:row",
    "sign:128",
    "lossless:2",
    "lossless:4",
    "lossless:8",
    "sparse",
    "low-rank",
)
MIXED = ("dense", "int4:32", "lossless:4", "low-rank", "sign:row", "sparse", "int8:128", "lossless:8", "sign:128")


def implementation(name: str) -> Callable[..., Tensor]:
    backend, execution = name.split("-")
    if backend == "torch":
        return lambda *args, **options: eager.linear(*args, execution=execution, **options)
    if backend == "cpp":
        from alignvec.compiled import cpu

        return lambda *args, **options: cpu.linear(*args, execution=execution, **options)
    if execution == "split_k":
        return lambda *args, **options: linear.linear(*args, execution="split", config=SPLIT_3, **options)
    return lambda *args, **options: linear.linear(*args, execution=execution, config=TILE, **options)


IMPLEMENTATIONS = ("torch-split", "torch-combine", "torch-auto", "triton-split", "triton-split_k", "triton-combine")
CPP = DEVICE == "cpu" and compiled.reason("cpu") is None
CPP_IMPLEMENTATIONS = ("cpp-split", "cpp-combine", "cpp-auto") if CPP else ()
IMPLEMENTATIONS += CPP_IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class Case:
    """`rows` is a number of rows, or "random" for a table row of its own for each token.

    `format` is one of FORMATS for all vectors, or "mixed" for those of MIXED in turn. `delta` is the dtype of values
    and factors where it is not x's and the weight's. Float32 weights have no lossless vectors: "mixed" leaves them out.
    """

    tokens: int
    out_features: int
    in_features: int
    k: int
    dtype: torch.dtype = BF16
    delta: torch.dtype | None = None
    rows: int | str = 1
    bias: bool = False
    format: str = "dense"

    def __str__(self) -> str:
        names = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
        parts = [f"{self.tokens}x{self.in_features}x{self.out_features}", f"k{self.k}", names[self.dtype]]
        parts += [f"delta_{names[self.delta]}"] if self.delta else []
        parts += [] if self.format == "dense" else [self.format.replace(":", "_")]
        return "-".join([*parts, f"rows_{self.rows}", *(["bias"] if self.bias else [])])

    @property
    def formats(self) -> list[str]:
        """The format of each vector."""
        if self.format != "mixed":
            return [self.format] * self.k
        cycle = [name for name in MIXED if self.dtype != FP32 or not name.startswith("lossless")]
        return [cycle[i % len(cycle)] for i in range(self.k)]

    def make(self, seed: int = 0, integers: bool = False) -> tuple[Any, ...]:
        """x, weight, bias, operands, bias_deltas, columns, table, rows, token_rows.

        integers: x of 0 and +-1, small integers for weights and multiples of 2^-4 for deltas (lossless: of the weight's
        last place), coefficients in steps of a half: float32 sums of a few hundred products leave nothing to round.
        """
        g = torch.Generator().manual_seed(seed)
        max_rows, n_vectors, delta = 8, self.k + 2, self.delta or self.dtype

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        x = randn(self.tokens, self.in_features).to(self.dtype)
        weight = randn(self.out_features, self.in_features).to(self.dtype)
        if integers:
            x = torch.randint(-1, 2, x.shape, generator=g).to(self.dtype)
            sign = torch.randint(0, 2, weight.shape, generator=g) * 2 - 1
            weight = (torch.randint(1, 8, weight.shape, generator=g) * sign).to(self.dtype)  # 0 has no steps of a size
        vectors = [operand(name, weight, delta, g, integers) for name in self.formats]
        bias = randn(self.out_features).to(self.dtype) if self.bias else None
        bias_deltas = randn(self.k, self.out_features).to(delta) if self.bias else None
        columns = torch.randperm(n_vectors, generator=g)[: self.k].to(torch.int32)
        table = randn(max_rows, n_vectors)
        if integers:
            table = table.mul(2).round().div(2)
        else:  # all vectors count alike, also those of single steps: an error in any of them shows
            for column, vector in zip(columns, vectors, strict=True):
                if vector.kind == "lossless":
                    table[:, column] *= 0.1 / operands.decode(vector, weight).std()
        rows = torch.tensor([self.rows if isinstance(self.rows, int) else 1], dtype=torch.int32)
        token_rows = None
        if self.rows == "random":
            token_rows = torch.randint(max_rows, (self.tokens,), generator=g, dtype=torch.int32)
        tensors = [t if t is None else t.to(DEVICE) for t in (bias_deltas, columns, table, rows, token_rows)]
        bias = None if bias is None else bias.to(DEVICE)
        return x.to(DEVICE), weight.to(DEVICE), bias, [v.to(torch.device(DEVICE)) for v in vectors], *tensors


def operand(
    name: str, weight: Tensor, dtype: torch.dtype, g: torch.Generator, integers: bool = False, size: float = 0.1
) -> Operand:
    """A random operand for `weight` [out, in] in one of FORMATS, of standard deviation `size`, on the CPU.

    dtype: of dense and sparse values and of low-rank factors. Lossless is as large as a step of the weight; a fiftieth
    of its deltas lie in the side table and are ten times as large, and the first row has none there.
    integers: multiples of 2^-4, those of lossless of the weight's last place.
    """
    kind, _, option = name.partition(":")
    out_features, in_features = weight.shape
    shape = (out_features, in_features)

    def values(*shape: int) -> Tensor:
        if integers:
            return (torch.randint(-7, 8, shape, generator=g) / 16).to(dtype)
        return (size * torch.randn(*shape, generator=g)).to(dtype)

    if kind == "dense":
        return operands.dense(values(*shape))
    if kind == "low-rank":
        rank = min(5, *shape)
        if integers:
            a, b = (torch.randint(-1, 2, s, generator=g) for s in ((rank, in_features), (out_features, rank)))
            return operands.low_rank(a.to(dtype), (b / 16).to(dtype))
        a, b = torch.randn(rank, in_features, generator=g), torch.randn(out_features, rank, generator=g)
        return operands.low_rank(a.to(dtype), (b * size * rank**-0.5).to(dtype))
    if kind == "sparse":
        mask = torch.rand(shape, generator=g) < 0.2
        mask[out_features // 2] = False  # a row without values
        return operands.from_mask(mask, values(int(mask.sum())) * (1 if integers else 2))
    if kind == "lossless":
        return _lossless(int(option), weight, g, integers)
    bits = {"sign": 1, "int4": 4, "int8": 8}[kind]
    group = 0 if option == "row" else int(option)
    fields = torch.randint(0 if bits == 1 else 1, 1 << bits, shape, generator=g).to(torch.uint8)
    groups = -(-in_features // group) if group else 1
    if integers and bits == 8:  # as large as int4: products stay exact
        fields = torch.randint(121, 136, shape, generator=g).to(torch.uint8)
    scales = torch.rand(out_features, groups, generator=g) + 0.5
    if integers:
        scales = torch.randint(1, 3, (out_features, groups), generator=g) / 16
    else:
        scales *= size / {1: 1, 4: 4.3, 8: 73}[bits]
    return operands.from_fields(fields, scales.to(BF16 if group else FP32), bits, group)


def _lossless(bits: int, weight: Tensor, g: torch.Generator, integers: bool) -> Operand:
    assert weight.element_size() == 2, "float32 weights have no lossless vectors"
    top = 1 << bits
    low, high = (1, top) if not integers else (top // 2 - 1, min(top // 2 + 2, top))
    fields = torch.randint(low, high, weight.shape, generator=g).to(torch.uint8)
    side = torch.rand(weight.shape, generator=g) < 0.02
    side[0], side[-1, -1] = False, True
    fields[side] = 0
    index = side.flatten().nonzero().flatten()
    values = torch.randint(-7, 8, index.shape, generator=g) / 16
    if not integers:
        ulp = torch.finfo(weight.dtype).eps
        values = torch.randn(index.shape, generator=g) * ulp * top * 5
    aligned = (weight.flatten()[index].float() + values).to(weight.dtype)
    return operands.from_steps(fields, bits, index, aligned)


def relative_error(y: Tensor, truth: Tensor) -> float:
    return ((y.double() - truth).norm() / truth.norm()).item()


def assert_one_rounding(y: Tensor, truth: Tensor) -> None:
    """`y` is as close to the float64 `truth` as rounding once to y's dtype leaves it.

    Beside that rounding, float32 sums of n products are off by about sqrt(n) 2^-24 of the norm: 2e-6 covers the n below
    a thousand used here. A second rounding, of a mix for instance, would add four tenths to the error of 16-bit types.
    """
    assert y.isfinite().all()
    rounding = relative_error(truth.to(y.dtype), truth)
    assert relative_error(y, truth) <= 1.02 * rounding + 2e-6
