"""Deltas and parameters of every dtype and of sizes 0 and 1: exact against arithmetic in float64, or refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import alignvec
from alignvec import AlignmentVector, AlignvecError
from alignvec.planner import backends
from tests.models import merged, tiny

BACKENDS = [name for name in ("torch", "cpp", "triton") if backends.obstacle("cpu", name) is None]
HOST = [name for name in BACKENDS if name != "triton"]  # whose calls take no interpreter
IDS = torch.arange(16).view(2, 8)


class _Config:
    vocab_size = 50


class Layers(nn.Module):
    """An embedding, a norm, a linear layer that has a bias, and a parameter of some shape that scales by its sum."""

    def __init__(self, features: int = 12, out: int = 7, extra: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.config = _Config()
        self.embed = nn.Embedding(50, features)
        self.norm = nn.LayerNorm(features)
        self.linear = nn.Linear(features, out)
        self.scale = Scale(extra)
        self.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.scale(self.linear(self.norm(self.embed(input_ids))))
        return result


class Scale(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.full(shape, 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + self.by.sum())


def deltas_of(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        n: torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype) * 0.3 for n, p in model.named_parameters()
    }


def _check(model: nn.Module, deltas: dict[str, torch.Tensor], backend: str, tolerance: float) -> None:
    """One token and eight, one mix and rows, the mix written out, against a merge in float64."""
    base = copy.deepcopy(model)
    vectors = {"v": AlignmentVector(deltas)}
    alignment = alignvec.attach(model, vectors, backend=backend)
    for ids in (IDS[:, :1], IDS):
        truth = [merged(base, vectors, {"v": c})(ids) for c in (0.5, -0.25)]
        alignment.set(v=0.5)
        found = [model(ids), truth[0]]
        alignment.set_rows([{"v": 0.5}, {"v": -0.25}])
        rows = [model(ids), torch.stack([truth[0][0], truth[1][1]])]
        alignment.materialise(v=0.5)
        for y, expected in (found, rows, (model(ids), truth[0])):
            assert (y.double() - expected).norm() <= tolerance * expected.norm()
        alignment.restore()


@pytest.mark.parametrize("delta", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", HOST)
def test_dtypes(backend: str, weight: torch.dtype, delta: torch.dtype) -> None:
    model = Layers().to(weight)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[weight]
    _check(model, deltas_of(model, delta), backend, tolerance)


SIZES = [(12, 7, ()), (1, 7, (1,)), (12, 1, (0,)), (1, 1, (3, 0)), (12, 0, (0, 3)), (12, 7, (2, 1, 1))]


@pytest.mark.parametrize(("features", "out", "extra"), SIZES)
@pytest.mark.parametrize("backend", HOST)
def test_sizes(backend: str, features: int, out: int, extra: tuple[int, ...]) -> None:
    model = Layers(features, out, extra)
    _check(model, deltas_of(model, torch.float32), backend, 2e-6)


class WithoutInputs(Layers):
    """Layers that lead to none, and a layer that makes its bias of them."""

    def __init__(self) -> None:
        super().__init__(12, 0)
        self.last = nn.Linear(0, 3).requires_grad_(False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(super().forward(input_ids))
        return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_inputs(backend: str) -> None:
    model = WithoutInputs()
    _check(model, deltas_of(model, torch.float32), backend, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deltas_of_several_dtypes_for_one_norm(backend: str) -> None:
    """The float64 one keeps what float32 would lose, in a float64 model."""
    model = Layers().double()
    fine = torch.full((12,), 1 + 2**-40, dtype=torch.float64)
    vectors = {"a": AlignmentVector({"norm.weight": fine}), "b": AlignmentVector({"norm.weight": fine.bfloat16()})}
    base = copy.deepcopy(model)
    alignment = alignvec.attach(model, vectors, backend=backend)
    alignment.set(a=1.0, b=-1.0)
    base.norm.weight += fine - 1  # the second vector holds ones
    assert torch.allclose(model(IDS), base(IDS), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["linear.weight", "linear.bias", "norm.weight", "embed.weight", "scale.by"])
def test_float64_values_beyond_float32_are_refused(name: str) -> None:
    shapes = {n: p.shape for n, p in Layers(extra=(2, 2)).named_parameters()}
    vector = AlignmentVector({name: torch.full(shapes[name], 1e39, dtype=torch.float64)})
    for dtype in (torch.float32, torch.bfloat16):
        model = Layers(extra=(2, 2)).to(dtype)
        before = dict(model.named_modules())
        with pytest.raises(AlignvecError, match=rf"{name}.*beyond float32's range"):
            alignvec.attach(model, {"v": vector})
        assert dict(model.named_modules()) == before
    model = Layers(extra=(2, 2)).double()
    base = copy.deepcopy(model)
    base.get_parameter(name).add_(math.ldexp(1e39, -130))
    alignvec.attach(model, {"v": vector}).set(v=2.0**-130)
    torch.testing.assert_close(model(IDS), base(IDS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_are_refused(dtype: torch.dtype) -> None:
    values = torch.ones(7, 12).to(dtype)
    with pytest.raises(AlignvecError, match=r"linear\.weight is torch"):
        AlignmentVector({"linear.weight": values})
    model = Layers()
    model.linear.weight = nn.Parameter(values, requires_grad=False)
    with pytest.raises(AlignvecError, match=r"linear\.weight, which is"):
        alignvec.attach(model, {"v": AlignmentVector({"linear.weight": torch.ones(7, 12)})})


@pytest.mark.parametrize("architecture", ["Mixtral", "GPT2"])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_float64_models(backend: str, architecture: str) -> None:
    """Routers and experts, Conv1D, the decoder; to the last bits where the model's own code has no float32."""
    own = {"experts_implementation": "eager"} if architecture == "Mixtral" else {}
    model = tiny(architecture, torch.float64, num_hidden_layers=1, **own)
    vectors = {"v": AlignmentVector(deltas_of(model, torch.float64))}
    truth = merged(copy.deepcopy(model), vectors, {"v": 0.5})
    alignment = alignvec.attach(model, vectors, backend=backend)
    alignment.set(v=0.5)
    ids = torch.randint(3, 101, (2, 8), generator=torch.Generator().manual_seed(4))
    expected = truth(ids).logits
    assert (model(ids).logits - expected).norm() / expected.norm() < (1e-13 if architecture == "GPT2" else 1e-6)
    text = alignment.decoder(max_length=20, max_batch=2).generate(ids, mixes=[{"v": 0.5}] * 2, max_new_tokens=5)
    assert torch.equal(text, truth.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None))
