"""Deterministic by construction: no kernel adds in an order that chance decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import alignvec
from alignvec.kernels import operands
from tests.models import random_vector, tiny

KERNELS = sorted((Path(alignvec.__file__).parent / "kernels").glob("*.py"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_kernel_uses_atomics(path: Path) -> None:
    source = path.read_text()
    assert "tl.atomic" not in source
    assert "atomic_" not in source
    assert "index_add" not in source
    assert "scatter_add" not in source


@pytest.fixture
def _deterministic() -> object:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
def test_the_eager_path_under_deterministic_algorithms() -> None:
    """Also where memory that was not written is filled with NaN, as torch does then."""
    model = tiny("Qwen2")
    alignment = alignvec.attach(model, {"a": random_vector(model, 1), "b": random_vector(model, 2)}, backend="torch")
    alignment.set_rows([{"a": 1.0}, {"b": -0.5}])
    ids = torch.arange(10).view(2, 5)
    first, second = (model(ids, labels=ids) for _ in range(2))
    assert first.logits.isfinite().all()
    assert torch.equal(first.logits, second.logits)
    weight = model.get_output_embeddings().weight
    gradients = [torch.autograd.grad(output.loss, weight)[0] for output in (first, second)]
    assert torch.equal(*gradients)


@pytest.mark.usefixtures("_deterministic")
def test_sparse_and_lossless_decode_under_deterministic_algorithms() -> None:
    mask = torch.rand(8, 64) < 0.3
    sparse = operands.from_mask(mask, torch.randn(int(mask.sum())))
    assert torch.equal(operands.decode(sparse), operands.decode(sparse))
    weight = torch.randn(8, 64).to(torch.bfloat16)
    fields = torch.randint(1, 16, (8, 64), dtype=torch.uint8)
    fields[3, 5] = 0
    lossless = operands.from_steps(fields, 4, torch.tensor([3 * 64 + 5]), torch.tensor([0.5]))
    assert torch.equal(operands.decode(lossless, weight), operands.decode(lossless, weight))
