"""A whole model on each backend that runs here against plain torch; on a CPU Triton runs in its interpreter."""

from __future__ import annotations

import pytest
import torch

import alignvec
from alignvec import planner
from alignvec.planner import backends
from tests.attach.test_architectures import relative
from tests.attach.test_every_format import FORMATS, encoded
from tests.models import random_vector, tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.randint(3, 101, (2, 5), generator=torch.Generator().manual_seed(3)).to(DEVICE)


@pytest.fixture(params=("triton", "cuda", "cpp"))
def other(request: pytest.FixtureRequest) -> str:
    reason = backends.obstacle(DEVICE, request.param)
    if reason is not None:
        pytest.skip(f"{request.param} cannot run on {DEVICE}: {reason}")
    return str(request.param)


@pytest.mark.parametrize("execution", ["split", "combine"])
@torch.no_grad()
def test_the_same_logits_as_torch(other: str, execution: str) -> None:
    model = tiny("Qwen2", num_hidden_layers=1).to(DEVICE)
    vectors = {"a": random_vector(model, 1), "b": random_vector(model, 2)}
    logits = {}
    for backend in ("torch", other):
        alignment = alignvec.attach(model, vectors, backend=backend, execution=execution)
        alignment.set_rows([{"a": 1.0}, {"b": -0.5}])
        mixed = model(IDS).logits
        alignment.set(a=0.3, b=0.3)
        logits[backend] = torch.stack([mixed, model(IDS).logits])
        alignment.detach()
    torch.testing.assert_close(logits[other], logits["torch"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "GPT2"])
@torch.no_grad()
def test_every_format_agrees_with_torch(other: str, architecture: str, dtype: torch.dtype) -> None:
    """Projections fused and not, embeddings, norms, and the mix written out."""
    model = tiny(architecture, torch.bfloat16, num_hidden_layers=1).to(DEVICE, dtype)
    vectors = {"a": encoded(model, 1, *FORMATS), "b": encoded(model, 2, *FORMATS[3:], "dense")}
    logits = {}
    for backend in ("torch", other):
        alignment = alignvec.attach(model, vectors, backend=backend)
        fused = [m for m in model.modules() if getattr(getattr(m, "edit", None), "fused", None) is not None]
        assert bool(fused) == (backend in planner.GROUPED and architecture != "GPT2")
        alignment.set_rows([{"a": 1.0}, {"a": 0.3, "b": -0.5}])
        mixed = model(IDS).logits
        alignment.materialise(a=0.3, b=0.3)
        logits[backend] = torch.stack([mixed, model(IDS).logits]).double()
        alignment.detach()
    assert relative(logits[other], logits["torch"]) < (5e-6 if dtype == torch.float32 else 0.03)
