"""A decoder's own layers on every backend that runs here; on a CPU Triton runs in its interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import alignvec
from alignvec import Decoder
from alignvec.planner import backends
from tests.models import random_vector, tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW = 4


@pytest.fixture(params=("triton", "cuda", "cpp", "torch"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = backends.obstacle(DEVICE, request.param)
    if reason is not None:
        pytest.skip(f"{request.param} cannot run on {DEVICE}: {reason}")
    yield str(request.param)
    backends.resolve_backend.cache_clear()


@pytest.mark.parametrize("architecture", ["Mistral", "Llama", "Qwen3"])
def test_every_backend_decodes_alike(backend: str, architecture: str) -> None:
    model = tiny(architecture, num_hidden_layers=2).to(DEVICE)
    vectors = {"a": random_vector(model, 1), "b": random_vector(model, 2)}
    ids = torch.randint(3, 101, (2, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mixes = [{"a": 0.7, "b": -0.4}, {"a": -1.0}]
    alignment = alignvec.attach(model, vectors, backend="torch")
    alignment.set_rows(mixes)
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    alignment.detach()
    decoder = alignvec.attach(model, vectors, backend=backend).decoder(max_batch=2, max_length=16)
    assert decoder.fused, decoder.reason
    assert torch.equal(decoder.generate(ids, mixes=mixes, max_new_tokens=NEW, eos_token_id=-1), expected)


def test_a_model_without_vectors(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNVEC_BACKEND", backend)
    backends.resolve_backend.cache_clear()
    model = tiny(num_hidden_layers=2).to(DEVICE)
    ids = torch.randint(3, 101, (2, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    decoder = Decoder(model, max_batch=2, max_length=16)
    assert decoder.fused, decoder.reason
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    assert torch.equal(decoder.generate(ids, max_new_tokens=NEW, eos_token_id=-1), expected)
