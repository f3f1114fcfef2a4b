"""The operators as torch sees them: schemas, fake kernels, tracing, and gradients against autograd's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from alignvec import ops
from alignvec.kernels import reference
from alignvec.kernels.operands import decode
from tests.kernels.cases import DEVICE, FP32, Case

CHOICES = ("auto", "exact", "torch")


def made(format: str = "mixed", k: int = 6, **options: Any) -> tuple[Any, ...]:
    return Case(6, 20, 70, k, FP32, rows=3, bias=True, format=format, **options).make()


def flat(vectors: list) -> tuple[list[str], list[torch.Tensor]]:
    return [vector.spec for vector in vectors], [part for vector in vectors for part in vector.parts]


def linear_arguments() -> tuple[Any, ...]:
    x, weight, bias, vectors, bias_deltas, columns, table, rows, token_rows = made()
    leaves = [t.requires_grad_() for t in (x.view(3, 2, -1), weight, bias)]
    return *leaves, *flat(vectors), bias_deltas, columns, table, rows, token_rows, *CHOICES


def group_arguments() -> tuple[Any, ...]:
    x, first, bias, vectors, bias_deltas, columns, *rest = made()
    _, second, other, more, _, fewer, *_ = Case(6, 12, 70, 2, FP32, bias=True, format="int4:32").make(seed=1)
    weights, biases = [first.requires_grad_(), second.requires_grad_()], [bias.requires_grad_(), other]
    specs, parts = flat(vectors + more)
    vectors_each, deltas, own = [len(vectors), len(more)], [bias_deltas, None], [columns, fewer]
    return x.requires_grad_(), weights, biases, specs, vectors_each, parts, deltas, own, *rest, *CHOICES


def norm_arguments(centred: bool) -> tuple[Any, ...]:
    *_, columns, table, rows, _ = made("dense", 3)
    x, weight, bias = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((3, 2, 7), (7,), (7,)))
    deltas, bias_deltas = torch.randn(3, 7, device=DEVICE), torch.randn(3, 7, device=DEVICE)
    if centred:
        return x, weight, bias, deltas, bias_deltas, columns, table, rows, 1e-5, "torch"
    return x, weight, deltas, columns, table, rows, 1e-5, 1.0, "torch"


def embedding_arguments() -> tuple[Any, ...]:
    _, weight, _, vectors, _, columns, table, rows, _ = made()
    ids = torch.tensor([[1, 19], [0, 4], [1, 7]], device=DEVICE)
    return ids, weight.requires_grad_(), *flat(vectors), columns, table, rows, "torch"


def mix_arguments() -> tuple[Any, ...]:
    _, weight, _, vectors, _, columns, table, rows, _ = made()
    return weight.requires_grad_(), *flat(vectors), columns, table, rows, 3


def materialise_arguments() -> tuple[Any, ...]:
    _, weight, _, vectors, _, columns, table, rows, _ = made()
    return weight, *flat(vectors), columns, table, rows.fill_(1), torch.zeros_like(weight), "torch"


ARGUMENTS = {
    "linear": linear_arguments,
    "linear_group": group_arguments,
    "embedding": embedding_arguments,
    "mix": mix_arguments,
    "materialise": materialise_arguments,
    "rms_norm": lambda: norm_arguments(False),
    "layer_norm": lambda: norm_arguments(True),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_torch_accepts_the_operator(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.alignvec, name).default, ARGUMENTS[name]())


def test_second_gradients_of_linear() -> None:
    arguments = linear_arguments()
    x, weight = arguments[:2]
    (first,) = torch.autograd.grad(ops.linear(*arguments).square().sum(), x, create_graph=True)
    got = torch.autograd.grad(first.square().sum(), (x, weight))
    _, _, bias, _, _, bias_deltas, columns, table, rows, *_ = arguments
    vectors = made()[3]
    flat_x = x.view(-1, x.shape[-1])
    y = reference.linear(flat_x, weight, bias, vectors, bias_deltas, columns, table, rows)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    expected = torch.autograd.grad(first.square().sum(), (x, weight))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("centred", [False, True], ids=["rms_norm", "layer_norm"])
def test_gradients_of_norms(centred: bool) -> None:
    arguments = norm_arguments(centred)
    leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    got = torch.autograd.grad((ops.layer_norm if centred else ops.rms_norm)(*arguments).sin().sum(), leaves)
    columns, table, rows = arguments[5:8] if centred else arguments[3:6]
    c = reference.token_coefficients(table, rows, columns, 6).view(3, 2, -1)
    if centred:
        x, weight, bias, deltas, bias_deltas = arguments[:5]
        y = F.layer_norm(x, (7,), None, None, 1e-5) * (weight + c @ deltas) + bias + c @ bias_deltas
    else:
        x, weight, deltas = arguments[:3]
        y = F.rms_norm(x, (7,), None, 1e-5) * (1 + weight + c @ deltas)
    for one, other in zip(got, torch.autograd.grad(y.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_embedding_gradient_reaches_the_base() -> None:
    ids, weight, *rest = embedding_arguments()
    (got,) = torch.autograd.grad(ops.embedding(ids, weight, *rest).square().sum(), weight)
    vectors, (columns, table, rows) = made()[3], rest[2:5]
    deltas = torch.stack([decode(vector) for vector in vectors])
    c = reference.token_coefficients(table, rows, columns, 6).view(3, 2, -1)
    y = F.embedding(ids, weight) + torch.einsum("bti,ibtd->btd", c, deltas[:, ids])
    torch.testing.assert_close(got, torch.autograd.grad(y.square().sum(), weight)[0], rtol=1e-4, atol=1e-4)
