"""A vector of float64 checkpoints on models of every dtype: forward and merge in the model give what float64 gives."""

from __future__ import annotations

import copy

import pytest
import torch

import alignvec
from tests.attach.transferred import new, tuned

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@torch.no_grad()
def test_a_float64_vector(dtype: torch.dtype, family: str) -> None:
    base = new(family).double()
    aligned = tuned(base)
    vector = alignvec.extract(base, aligned)
    assert {info.dtype for info in vector.tensors.values()} == {torch.float64}
    truth = aligned(IDS).logits
    model = copy.deepcopy(base).to(dtype)
    alignment = alignvec.attach(model, {"v": vector})
    alignment.set(v=1.0)
    assert (model(IDS).logits.double() - truth).norm() / truth.norm() < TOLERANCE[dtype]
    alignment.materialise(v=1.0)
    assert (model(IDS).logits.double() - truth).norm() / truth.norm() < TOLERANCE[dtype]
