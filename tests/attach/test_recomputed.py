"""Gradients are those of the mix that their own forward used, also where layers are computed again for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignvec import AlignvecError
from tests.tuned import IDS, built, error, with_vector


class Checkpointed(nn.Module):
    """A layer that somebody's own code computes again."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def by_transformers(model: nn.Module, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def by_hand(model: nn.Module, reentrant: bool) -> None:
    for layer in model.model.layers:
        layer.mlp = Checkpointed(layer.mlp, reentrant)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    names = ((name.replace(".inner.", "."), p) for name, p in model.named_parameters())
    return {name: p.grad.clone() for name, p in names if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", [by_transformers, by_hand])
def test_another_mix_between_forward_and_backward(how: Callable[..., None], reentrant: bool) -> None:
    model = built("LlamaConfig").train()
    base, aligned, alignment = with_vector(model)
    how(model, reentrant)
    model.enable_input_require_grads()

    def loss() -> Tensor:
        alignment.set(v=1)
        policy = model(IDS).logits
        with torch.no_grad(), alignment.using(v=0):
            reference = model(IDS).logits
        alignment.set(v=-1)
        return (policy - reference).square().sum()

    got = gradients(model, loss)
    wanted = gradients(aligned.train(), lambda: (aligned(IDS).logits - base(IDS).logits.detach()).square().sum())
    for name, truth in wanted.items():
        assert error(got[name], truth) < 1e-4, name


@pytest.mark.parametrize("how", [by_transformers, by_hand])
def test_two_mixes_in_one_backward_are_refused(how: Callable[..., None]) -> None:
    model = built("LlamaConfig").train()
    _, _, alignment = with_vector(model)
    how(model, False)
    alignment.set(v=1)
    first = model(IDS).logits.sum()
    alignment.set(v=0)
    second = model(IDS).logits.sum()
    with pytest.raises(AlignvecError, match="several forward passes under different mixes"):
        (first + second).backward()
    alignment.set(v=1)
    model(IDS).logits.sum().backward()  # one after the other they are fine


def test_rows_are_computed_again_as_rows() -> None:
    model = built("LlamaConfig").train()
    _, aligned, alignment = with_vector(model)
    by_transformers(model, False)
    alignment.set_rows([{"v": 1}, {"v": 0}])
    logits = model(IDS).logits
    alignment.set(v=0.3)
    model.zero_grad()
    logits[0].square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    aligned(IDS[:1]).logits.square().sum().backward()
    for name, parameter in aligned.named_parameters():
        assert error(got[name], parameter.grad) < 1e-4, name


def test_a_compiled_policy_and_its_reference() -> None:
    model = built("LlamaConfig").train()
    base, aligned, alignment = with_vector(model)
    compiled = torch.compile(model, backend="aot_eager")

    def loss() -> Tensor:
        alignment.set(v=1)
        policy = compiled(IDS, use_cache=False).logits
        with torch.no_grad(), alignment.using(v=0):
            reference = compiled(IDS, use_cache=False).logits
        return (policy - reference).square().sum()

    got = gradients(model, loss)
    wanted = gradients(aligned.train(), lambda: (aligned(IDS).logits - base(IDS).logits.detach()).square().sum())
    for name, truth in wanted.items():
        assert error(got[name], truth) < 1e-4, name
    torch._dynamo.reset()


def test_results_may_be_written_to() -> None:
    """As torch's own layers allow it: models add to what a layer gave."""
    model = built("LlamaConfig")
    _, aligned, alignment = with_vector(model)
    alignment.set(v=1)
    x = torch.randn(2, 3, 32)
    for net in (model, aligned):
        net.model.layers[0].mlp.up_proj(x).add_(1).square().sum().backward()
    one, other = (net.model.layers[0].mlp.up_proj.weight.grad for net in (model, aligned))
    assert error(one, other) < 1e-5
