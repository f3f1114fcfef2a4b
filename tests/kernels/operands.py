"""Random operands of the linear operator, its implementations, and the error measure that the kernel tests share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alignvec.kernels import dense, eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# One large tile where the interpreter runs them, the shipped choice where a GPU does.
TILE = dense.Config(16, 64, 128, 4, 2) if DEVICE == "cpu" else None
SPLIT_3 = dense.Config(16, 32, 32, 4, 2, split_k=3)


def implementation(name: str) -> Callable[..., Tensor]:
    backend, execution = name.split("-")
    if backend == "torch":
        return lambda *args, **options: eager.linear(*args, execution=execution, **options)
    if execution == "split_k":
        return lambda *args, **options: dense.linear(*args, execution="split", config=SPLIT_3, **options)
    return lambda *args, **options: dense.linear(*args, execution=execution, config=TILE, **options)


IMPLEMENTATIONS = ("torch-split", "torch-combine", "torch-auto", "triton-split", "triton-split_k", "triton-combine")


@dataclasses.dataclass(frozen=True)
class Case:
    """`rows` is a number of rows, or "random" for a table row of its own for each token."""

    tokens: int
    out_features: int
    in_features: int
    k: int
    dtype: torch.dtype = BF16
    delta: torch.dtype | None = None
    rows: int | str = 1
    bias: bool = False

    def __str__(self) -> str:
        names = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
        parts = [f"{self.tokens}x{self.in_features}x{self.out_features}", f"k{self.k}", names[self.dtype]]
        parts += [f"delta_{names[self.delta]}"] if self.delta else []
        return "-".join([*parts, f"rows_{self.rows}", *(["bias"] if self.bias else [])])

    def make(self, seed: int = 0) -> tuple[Any, ...]:
        """x, weight, bias, deltas, bias_deltas, columns, table, rows, token_rows."""
        g = torch.Generator().manual_seed(seed)
        max_rows, n_vectors, delta = 8, self.k + 2, self.delta or self.dtype

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        x = randn(self.tokens, self.in_features).to(self.dtype)
        weight = randn(self.out_features, self.in_features).to(self.dtype)
        deltas = (0.1 * randn(self.k, self.out_features, self.in_features)).to(delta)
        bias = randn(self.out_features).to(self.dtype) if self.bias else None
        bias_deltas = randn(self.k, self.out_features).to(delta) if self.bias else None
        columns = torch.randperm(n_vectors, generator=g)[: self.k].to(torch.int32)
        table = randn(max_rows, n_vectors)
        rows = torch.tensor([self.rows if isinstance(self.rows, int) else 1], dtype=torch.int32)
        token_rows = None
        if self.rows == "random":
            token_rows = torch.randint(max_rows, (self.tokens,), generator=g, dtype=torch.int32)
        made = (x, weight, bias, deltas, bias_deltas, columns, table, rows, token_rows)
        return tuple(t if t is None else t.to(DEVICE) for t in made)


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
