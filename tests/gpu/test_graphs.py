"""One captured graph serves every mix: coefficients and rows in use change between replays, results follow."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import alignvec
from alignvec.kernels import embedding, linear, materialise, norm, reference
from alignvec.kernels.linear import Projection
from tests.kernels.cases import BF16, DEVICE, TILE, Case, assert_one_rounding
from tests.models import random_vector, tiny

Capture = Callable[[Callable[[], Any]], Callable[[], Any]]
TOKENS = 12
LAYER = Case(TOKENS, 70, 150, 3, bias=True, format="mixed")


def follow(table: Tensor, rows: Tensor, replay: Callable[[], Any], check: Callable[[Any], None]) -> None:
    """Replays under other mixes, rows that differ or not, and vectors that no row uses."""
    original = table.clone()
    for number, count in enumerate((1, 4, 6, 3, 1)):
        table.copy_(original * (1 - 0.3 * number))
        if number % 2:
            table[:, number % table.shape[1]] = 0
        rows.fill_(count)
        check(replay())


def not_a_mix(rows: Tensor, replay: Callable[[], Any]) -> None:
    """Rows that do not divide the tokens are loud in a graph, too."""
    rows.fill_(5)
    assert replay().isnan().all()


@pytest.mark.parametrize("precision", ["exact", "merged"])
@pytest.mark.parametrize("execution", ["split", "combine", "materialise"])
def test_linear(execution: str, precision: str, captured: Capture) -> None:
    args = LAYER.make()
    table, rows = args[6], args[7]
    replay = captured(lambda: linear.linear(*args, execution=execution, precision=precision, config=TILE))

    def check(y: Tensor) -> None:
        truth = reference.linear(*args)
        if execution == "split" or precision == "exact":
            assert_one_rounding(y, truth)
        else:  # a rounded mix
            assert (y.double() - truth).norm() / truth.norm() < 2e-2

    if execution == "materialise":  # takes one mix for all tokens
        original = table.clone()
        for factor in (1.0, -0.5, 0.0, 1.0):
            table.copy_(original * factor)
            check(replay())
        return
    follow(table, rows, replay, check)
    not_a_mix(rows, replay)


@pytest.mark.parametrize("execution", ["split", "combine"])
def test_rows_of_tokens(execution: str, captured: Capture) -> None:
    """A map from tokens to rows is device data like the rows themselves."""
    args = Case(TOKENS, 70, 150, 3, rows="random", format="mixed").make()
    replay = captured(lambda: linear.linear(*args, execution=execution, config=TILE))
    for shift in range(3):
        args[8].add_(shift).remainder_(8)
        assert_one_rounding(replay(), reference.linear(*args))


def test_projections_of_one_launch(captured: Capture) -> None:
    layers = [
        Case(TOKENS, out, 150, 3, bias=True, format=name).make(out) for out, name in ((70, "mixed"), (33, "int4:32"))
    ]
    x, table, rows = layers[0][0], layers[0][6], layers[0][7]
    members = [Projection(*layer[1:6]) for layer in layers]
    replay = captured(lambda: linear.linear_group(x, members, table, rows, config=TILE))

    def check(results: list[Tensor]) -> None:
        for y, (_, *layer) in zip(results, layers, strict=True):
            assert_one_rounding(y, reference.linear(x, *layer[:5], table, rows))

    follow(table, rows, replay, check)


@pytest.mark.parametrize("format", ["dense", "mixed"])
def test_embedding(format: str, captured: Capture) -> None:
    _, weight, _, vectors, _, *mixes = Case(TOKENS, 40, 130, 3, format=format).make()
    ids = torch.randint(40, (TOKENS,), device=DEVICE)
    replay = captured(lambda: embedding.embedding(ids, weight, vectors, *mixes))

    def check(y: Tensor) -> None:
        assert_one_rounding(y, reference.embedding(ids, weight, vectors, *mixes))

    follow(mixes[1], mixes[2], replay, check)
    ids.copy_(ids.flip(0))
    check(replay())
    not_a_mix(mixes[2], replay)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_norm(centred: bool, captured: Capture) -> None:
    columns, table, rows = Case(TOKENS, 40, 130, 3).make()[5:8]
    x, weight, bias = (torch.randn(*shape, 130, device=DEVICE).to(BF16) for shape in ((TOKENS,), (), ()))
    deltas, bias_deltas = (torch.randn(2, 3, 130, device=DEVICE) * 0.3).to(BF16)
    mixes = (columns, table, rows)
    if centred:
        replay = captured(lambda: norm.layer_norm(x, weight, bias, deltas, bias_deltas, *mixes, eps=1e-5))
    else:
        replay = captured(lambda: norm.rms_norm(x, weight, deltas, *mixes, eps=1e-5))

    def check(y: Tensor) -> None:
        c = reference.token_coefficients(table, rows, columns, TOKENS).double()
        scale = weight.double() + c @ deltas.double()
        if centred:
            truth = F.layer_norm(x.double(), (130,), eps=1e-5) * scale + bias.double() + c @ bias_deltas.double()
        else:
            truth = F.rms_norm(x.double(), (130,), eps=1e-5) * scale
        assert_one_rounding(y, truth)

    follow(table, rows, replay, check)
    not_a_mix(rows, replay)


@pytest.mark.parametrize("format", ["dense", "lossless:4", "mixed"])
def test_materialise(format: str, captured: Capture) -> None:
    _, weight, _, vectors, _, columns, table, rows, _ = Case(1, 70, 150, 3, format=format).make()
    out, low = torch.empty_like(weight), torch.empty_like(weight)
    replay = captured(lambda: materialise.materialise(weight, vectors, columns, table, rows, out=out, low=low))
    original = table.clone()
    for factor in (1.0, 0.5, 0.0, -1.0):
        table.copy_(original * factor)
        replay()
        truth = reference.mix(weight, vectors, columns, table, rows, 1)[0]
        assert (out.double() + low.double() - truth).norm() <= 2**-16 * truth.norm()
    table.zero_()
    replay()
    assert torch.equal(out, weight)


def attached() -> tuple[nn.Module, alignvec.Alignment, Tensor]:
    model = tiny("Qwen2", num_hidden_layers=1)
    vectors = {"a": random_vector(model, 1), "b": random_vector(model, 2)}
    alignment = alignvec.attach(model.to(DEVICE), vectors, backend="triton")
    return model, alignment, torch.randint(3, 101, (4, 5), device=DEVICE)


@torch.no_grad()
def test_a_step_of_a_model(captured: Capture) -> None:
    """Coefficients set between replays are those of the next replay: the graph itself begins with what is staged."""
    model, alignment, ids = attached()
    replay = captured(lambda: model(ids, use_cache=False).logits)
    seen = []
    for mixes in ([{"a": 1.0}], [{"a": 0.3, "b": -2.0}], [{"a": 1.0}, {"b": 0.5}], [{}, {"a": 1}, {"b": 1}, {}]):
        alignment.set_rows(mixes)
        got = replay().clone()
        torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
        seen.append(got)
    assert all(not torch.allclose(one, other) for one, other in itertools.pairwise(seen))


@torch.no_grad()
def test_compiled_without_recompiling() -> None:
    """One full graph by torch.compile, on a GPU by its own code generator, follows every mix."""
    model, alignment, ids = attached()
    compiler = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=compiler)
    compiled(ids, use_cache=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mixes in ([{"a": 1.0}], [{"a": 1.0}, {"b": 0.5}], [{}, {"a": 1}, {"b": 1}, {}]):
            alignment.set_rows(mixes)
            got = compiled(ids, use_cache=False).logits
            torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
