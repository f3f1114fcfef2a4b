"""What code that reads a parameter gets behaves as a tensor of the parameter's dtype, whatever is done with it."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import alignvec
from tests.models import merged
from tests.tuned import IDS, built, error, tuned


def set_item(h: Tensor, w: Tensor) -> Tensor:
    out = torch.empty_like(h)
    out[:] = h
    out[:, 1] = w
    return out


def out_argument(h: Tensor, w: Tensor) -> Tensor:
    out = torch.full_like(h, float("nan"))
    torch.mul(h, w, out=out)
    return out


def memory(h: Tensor, w: Tensor) -> Tensor:
    """As a kernel that is handed an address reads it."""
    raw = (ctypes.c_char * (w.numel() * w.element_size())).from_address(w.data_ptr())
    return h * torch.frombuffer(bytearray(raw), dtype=w.dtype)


def widened(h: Tensor, w: Tensor) -> Tensor:
    doubled = w.float()
    doubled.mul_(2) if doubled.dtype != w.dtype else None
    return h * w.float().to(h.dtype)


WAYS: list[Callable[[Tensor, Tensor], Tensor]] = [
    set_item,
    out_argument,
    memory,
    widened,
    lambda h, w: h * w.to(h.device),
    lambda h, w: F.linear(h, torch.diag(w.to(h.device))),
    lambda h, w: h * nn.Parameter(w.clone()),
    lambda h, w: h * torch.zeros_like(w).copy_(w),
    lambda h, w: h * w.new_zeros(w.shape).add_(w),
    lambda h, w: h.clone().mul_(w),
    lambda h, w: torch.stack([h[..., i] * x for i, x in enumerate(w)], -1),
    lambda h, w: torch.lerp(h, h * w, 0.3),
    lambda h, w: torch.einsum("bsh,h->bsh", h, w),
    lambda h, w: h * torch.from_dlpack(w.detach().float()).to(h.dtype),
]


class Way(nn.Module):
    def __init__(self, way: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.inner, self.way = nn.Parameter(torch.randn(32)), nn.Linear(32, 32), way

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.way(x, self.w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS, ids=range(len(WAYS)))
@torch.no_grad()
def test_every_way_of_using_it(way: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    model = built("LlamaConfig")
    model.model.layers[0].mlp = Way(way)
    model = model.to(dtype)
    base, aligned = copy.deepcopy(model), tuned(model)
    vector = alignvec.extract(base, aligned)
    alignvec.attach(model, {"v": vector}).set(v=1)
    wide = merged(base, {"v": vector}, {"v": 1.0}).float()
    got = model(IDS).logits
    assert got.dtype == dtype
    assert error(got, wide(IDS).logits) < {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]


@torch.no_grad()
def test_routers_give_the_dtypes_that_they_give() -> None:
    """float32 in a model of bfloat16: rounded, other experts would be chosen."""
    how = dict(num_local_experts=4, num_experts_per_tok=2)
    model = built("MixtralConfig", **how).bfloat16()
    plain = copy.deepcopy(model)
    alignvec.attach(model, {"v": alignvec.extract(plain, tuned(plain))})
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    seen = []
    for net in (plain, model):
        handle = net.model.layers[0].mlp.gate.register_forward_hook(lambda *a: seen.append(a[-1]))
        net.model.layers[0].mlp(x)
        handle.remove()
    for one, other in zip(*seen, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_a_base_that_changes_under_lossless_vectors_is_refused() -> None:
    """They are steps on the bits that it had."""
    model = built("LlamaConfig").bfloat16()
    base, aligned = copy.deepcopy(model), tuned(model)
    vector = alignvec.extract(base, aligned, format="lossless")
    alignment = alignvec.attach(model, {"v": vector})
    alignment.set(v=1)
    before = model(IDS).logits
    weight = model.model.layers[0].mlp.up_proj.weight
    for change in (lambda: weight.add_(0.1), lambda: setattr(weight, "data", weight.data.float())):
        kept = weight.data.clone()
        change()
        with pytest.raises(
            alignvec.AlignvecError, match=r"model\.layers\.0\.mlp\.up_proj\.weight changed after attach"
        ):
            model(IDS)
        weight.data = kept
        alignment.materialise(v=1)
        alignment.restore()
        assert torch.equal(model(IDS).logits, before)
