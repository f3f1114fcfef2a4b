"""A whole model on the Triton kernels, in the interpreter where there is no GPU, against the plain torch backend."""

from __future__ import annotations

import pytest
import torch

import alignvec
from tests.attach.test_architectures import relative
from tests.attach.test_every_format import FORMATS, encoded
from tests.models import random_vector, tiny

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.randint(3, 101, (2, 5), generator=torch.Generator().manual_seed(3)).to(DEVICE)


@pytest.mark.parametrize("execution", ["split", "combine"])
@torch.no_grad()
def test_triton_and_torch_give_the_same_logits(execution: str) -> None:
    model = tiny("Qwen2", num_hidden_layers=1).to(DEVICE)
    vectors = {"a": random_vector(model, 1), "b": random_vector(model, 2)}
    logits = {}
    for backend in ("torch", "triton"):
        alignment = alignvec.attach(model, vectors, backend=backend, execution=execution)
        alignment.set_rows([{"a": 1.0}, {"b": -0.5}])
        mixed = model(IDS).logits
        alignment.set(a=0.3, b=0.3)
        logits[backend] = torch.stack([mixed, model(IDS).logits])
        alignment.detach()
    torch.testing.assert_close(logits["triton"], logits["torch"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "GPT2"])
@torch.no_grad()
def test_triton_and_torch_agree_on_every_format(architecture: str, dtype: torch.dtype) -> None:
    """Projections fused and not, embeddings, norms, and the mix written out."""
    model = tiny(architecture, torch.bfloat16, num_hidden_layers=1).to(DEVICE, dtype)
    vectors = {"a": encoded(model, 1, *FORMATS), "b": encoded(model, 2, *FORMATS[3:], "dense")}
    logits = {}
    for backend in ("torch", "triton"):
        alignment = alignvec.attach(model, vectors, backend=backend)
        fused = [m for m in model.modules() if getattr(getattr(m, "edit", None), "fused", None) is not None]
        assert bool(fused) == (backend == "triton" and architecture != "GPT2")
        alignment.set_rows([{"a": 1.0}, {"a": 0.3, "b": -0.5}])
        mixed = model(IDS).logits
        alignment.materialise(a=0.3, b=0.3)
        logits[backend] = torch.stack([mixed, model(IDS).logits]).double()
        alignment.detach()
    assert relative(logits["triton"], logits["torch"]) < (5e-6 if dtype == torch.float32 else 0.03)
