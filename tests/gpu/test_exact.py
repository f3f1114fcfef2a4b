"""Products of small integers leave nothing to round: every format in every tile that is launched, to the last bit.

On Hopper a pipelined wgmma with its first operand in registers can be wrong (triton-lang/triton#9433). Which tiles meet
that depends on the versions, so all that are in use are tried, at one to four stages.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton

from alignvec.kernels import linear, reference, tiling
from alignvec.kernels.configs import Config
from tests.kernels.cases import BF16, DEVICE, FORMATS, FP16, Case

ON_GPU = DEVICE == "cuda"
TOKENS = (1, 16, 64, 128, 2048) if ON_GPU else (5,)
OUT, INPUTS = (160, 2304) if ON_GPU else (40, 300)  # two chunks of bit planes; a tile that is not full


def launched(execution: str, case: Case, width: int, stages: int) -> list[Config]:
    """The tiles that a large layer would take, and those with the inputs split."""
    if not ON_GPU:
        return [Config(16, 64, 64, 4, stages)]
    if execution == "combine":
        chosen = tiling.combine_config(case.k, case.dtype, case.dtype, plain=case.format == "dense")
        return [replace(chosen, num_stages=stages)]
    sizes = (case.tokens, 8192, case.in_features, case.k, case.dtype, case.dtype)
    chosen = replace(tiling.split_config(*sizes, width=width), num_stages=stages)
    return [replace(chosen, split_k=count) for count in (1, 3)]


@pytest.mark.parametrize("stages", [pytest.param(s, marks=[] if s == 2 else pytest.mark.gpu) for s in (1, 2, 3, 4)])
@pytest.mark.parametrize("execution", ["split", "combine"])
@pytest.mark.parametrize("format", [*FORMATS, "mixed"])
def test_integers(format: str, execution: str, stages: int) -> None:
    for tokens in TOKENS:
        case = Case(tokens, OUT, INPUTS, 3, format=format)
        args = case.make(integers=True)
        width = min((o.width for o in args[3] if o.width), default=0)
        for count in (1, 4) if tokens % 4 == 0 else (1,):
            args[7].fill_(count)
            truth = reference.linear(*args).to(case.dtype)
            for config in launched(execution, case, width, stages):
                try:
                    y = linear.linear(*args, execution=execution, config=config)
                except triton.runtime.errors.OutOfResources:
                    continue  # more shared memory than this GPU has: never launched
                wrong = (y != truth).sum().item()
                assert not wrong, f"{wrong} of {y.numel()} with {tokens} tokens, {count} rows, {config}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("format", [*FORMATS, "mixed"])
@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 2048])
def test_what_is_launched_by_itself(tokens: int, format: str, dtype: torch.dtype) -> None:
    """No tiles forced: the GPU's tuned table, where it has one, and the shapes' own choice."""
    args = Case(tokens, OUT, INPUTS, 3, dtype, format=format).make(integers=True)
    for execution in ("auto", "split", "combine"):
        y = linear.linear(*args, execution=execution)
        assert torch.equal(y, reference.linear(*args).to(dtype)), execution
