"""A row at coefficient 0 does not read a vector that the row beside it does: in whole models, with deltas whose
products overflow, its logits have the bits that they have beside a vector of ordinary size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import alignvec
from alignvec import AlignmentVector
from alignvec.planner import backends
from tests.attach.test_every_format import FORMATS, encoded, model_of
from tests.models import random_vector, tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HUGE = 3e38
MIXES = [{"other": 0.5}, {"own": 1.0, "other": 0.5}]


def _ids(tokens: int) -> torch.Tensor:
    return torch.randint(3, 101, (2, tokens), generator=torch.Generator().manual_seed(tokens)).to(DEVICE)


def _overflowing(vector: AlignmentVector) -> AlignmentVector:
    """The same signs, with values of 3e38; of formats that scale, scales and factors of that size."""
    deltas = {}
    for name in vector.names:
        held = vector.encoded(name)
        parts = dict(held.parts)
        for part in ("", "scales", "A", "values"):
            if part in parts and parts[part].is_floating_point():
                values = parts[part]
                parts[part] = torch.where(values < 0, -HUGE, HUGE).to(values.dtype)
        deltas[name] = type(held)(held.name, held.shape, held.options, parts)
    return AlignmentVector(deltas)


def _logits(model: nn.Module, own: AlignmentVector, backend: str, execution: str, tokens: int) -> torch.Tensor:
    vectors = {"own": own, "other": random_vector(model, 5, base=False)}
    alignment = alignvec.attach(model, vectors, backend=backend, execution=execution)
    try:
        alignment.set_rows(MIXES)
        result: torch.Tensor = model(_ids(tokens)).logits
        return result
    finally:
        alignment.detach()


CASES = [
    (backend, architecture, "auto", tokens)
    for backend in ("torch", "cpp")
    for architecture in ("Mistral", "GPT2", "Mixtral")
    for tokens in (1, 8)
]
CASES += [("cpp", "Mistral", "combine", 8), ("torch", "Mistral", "split", 20)]


@pytest.mark.parametrize(("backend", "architecture", "execution", "tokens"), CASES)
@torch.no_grad()
def test_dense(backend: str, architecture: str, execution: str, tokens: int) -> None:
    """Linear layers and their biases, embeddings, norms, routers and experts, siblings in one launch."""
    if (reason := backends.obstacle(DEVICE, backend)) is not None:
        pytest.skip(reason)
    model = tiny(architecture, num_hidden_layers=1).to(DEVICE)
    tame = random_vector(model, 1, base=False)
    expected = _logits(model, tame, backend, execution, tokens)
    found = _logits(model, _overflowing(tame), backend, execution, tokens)
    assert expected[0].isfinite().all()
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[1], expected[1])


@pytest.mark.parametrize("execution", ["auto", "split"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_rows_of_experts_are_told_apart_beside_infinity(dtype: torch.dtype, execution: str) -> None:
    """At coefficient 1 these models compute infinity, in split under any other coefficient as well."""
    model = model_of("Mixtral", dtype).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    tame = AlignmentVector({n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()})
    expected, found = (_logits(model, own, "auto", execution, 8) for own in (tame, _overflowing(tame)))
    assert expected[0].isfinite().all()
    assert torch.equal(found[0], expected[0])
    assert not found[1].isfinite().all()


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith(("lossless", "int"))])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
@torch.no_grad()
def test_formats(backend: str, name: str) -> None:
    if (reason := backends.obstacle(DEVICE, backend)) is not None:
        pytest.skip(reason)
    model = model_of("Mistral", torch.bfloat16).to(DEVICE)
    tame = encoded(model, 1, name, base=False)
    tame = tame.select([n for n in tame.names if tame.encoded(n).name != "dense"])
    expected = _logits(model, tame, backend, "auto", 4)
    found = _logits(model, _overflowing(tame), backend, "auto", 4)
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[1], expected[1])


def test_gradient() -> None:
    model = tiny("Mistral", num_hidden_layers=1).to(DEVICE).requires_grad_(False)
    tame = random_vector(model, 1, base=False)
    gradients = []
    for own in (tame, _overflowing(tame)):
        alignment = alignvec.attach(model, {"own": own, "other": random_vector(model, 5, base=False)})
        alignment.set_rows(MIXES)
        x = torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(2)).to(DEVICE).requires_grad_()
        model(inputs_embeds=x).logits[0].square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad[0])
        alignment.detach()
    assert torch.equal(*gradients)
