"""Which backend runs, and why another does not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from alignvec import AlignvecError, compiled, ops, planner
from alignvec.cli.app import app
from alignvec.kernels import eager
from alignvec.planner import backends, explain


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Says which parts of csrc are live; by default none is. Triton is there and has no interpreter."""
    live: set[str] = set()
    monkeypatch.setattr(compiled, "reason", lambda part: None if part in live else f"csrc/{part} is not built")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("ALIGNVEC_BACKEND", raising=False)
    planner.resolve_backend.cache_clear()
    yield lambda part: (live.add(part), planner.resolve_backend.cache_clear())[1]
    planner.resolve_backend.cache_clear()


def test_auto_takes_compiled_code_on_a_cpu_and_triton_on_a_gpu(built: Callable[[str], None]) -> None:
    assert planner.resolve_backend("cpu") == "torch"
    assert planner.resolve_backend("cuda") == "triton"
    assert planner.resolve_backend("mps") == "torch"
    built("cpu")
    built("cuda")
    assert planner.resolve_backend("cpu") == "cpp"
    assert planner.resolve_backend("cuda") == "triton"
    assert planner.resolve_backend("cuda", "cuda") == "cuda"


@pytest.mark.parametrize(
    ("device_type", "backend", "reason"),
    [
        ("cpu", "cpp", "csrc/cpu is not built"),
        ("cuda", "cpp", "it is for tensors on a CPU"),
        ("cuda", "cuda", "csrc/cuda is not built"),
        ("cpu", "cuda", "it is for tensors on a GPU"),
        ("cpu", "triton", "it needs a GPU"),
    ],
)
def test_one_that_cannot_run_is_an_error(
    built: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, device_type: str, backend: str, reason: str
) -> None:
    message = f"backend '{backend}' cannot run on {device_type}: {reason}.*; use backend 'torch'"
    with pytest.raises(AlignvecError, match=message):
        planner.resolve_backend(device_type, backend)
    monkeypatch.setenv("ALIGNVEC_BACKEND", backend)
    with pytest.raises(AlignvecError, match=message):
        planner.resolve_backend(device_type)


def test_the_environment_replaces_auto_alone(built: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    built("cpu")
    monkeypatch.setenv("ALIGNVEC_BACKEND", "torch")
    assert planner.linear_kernel(torch.device("cpu"), "auto") is eager.linear
    assert planner.linear_kernel(torch.device("cuda"), "auto") is eager.linear
    assert planner.resolve_backend("cpu", "cpp") == "cpp"
    monkeypatch.setenv("ALIGNVEC_BACKEND", "abacus")
    planner.resolve_backend.cache_clear()
    with pytest.raises(AlignvecError, match="ALIGNVEC_BACKEND='abacus' is not one of auto, triton, cuda, cpp, torch"):
        planner.resolve_backend("cpu")


def test_cuda_leaves_all_but_linear_layers_to_triton(
    built: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    built("cuda")
    built("cpu")
    assert planner.beside_linear("cuda", "cuda") == "triton"
    assert planner.beside_linear("cpu") == "cpp"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    planner.resolve_backend.cache_clear()
    with pytest.raises(AlignvecError, match="backend 'cuda' cannot run on cuda: the triton package is not installed"):
        planner.beside_linear("cuda", "cuda")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="projections are those of the triton kernels")
@pytest.mark.parametrize("backend", ["triton", "cuda", "cpp"])
def test_layers_reach_the_module_of_their_backend(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """One layer alone, and two with the same input, in one call where the backend has one."""
    calls = []

    def one(x: torch.Tensor, *layer: Any, **how: str) -> torch.Tensor:
        calls.append(("linear", how))
        return eager.linear(x, *layer, **how)

    def group(x: torch.Tensor, projections: Any, *shared: torch.Tensor, **how: str) -> list[torch.Tensor]:
        calls.append(("linear_group", how))
        layers = [(p.weight, p.bias, p.operands, p.bias_deltas, p.columns) for p in projections]
        return [eager.linear(x, *layer, *shared, **how) for layer in layers]

    stand_in = SimpleNamespace(linear=one, linear_group=group)
    monkeypatch.setattr(planner, "resolve_backend", lambda device_type, name: name)
    monkeypatch.setattr(planner, "linear_module", lambda name: {backend: stand_in}[name])
    monkeypatch.setattr(planner, "linear_kernel", lambda device, name: {backend: stand_in}[name].linear)
    x, weights = torch.randn(2, 8), [torch.randn(4, 8), torch.randn(6, 8)]
    shared = (torch.zeros(1, 1), torch.ones(1, dtype=torch.int32), None, "split", "exact", backend)
    columns = torch.zeros(0, dtype=torch.int32)
    torch.testing.assert_close(ops.linear(x, weights[0], None, [], [], None, columns, *shared), x @ weights[0].t())
    both = ops.linear_group(x, weights, [], [], [0, 0], [], [None, None], [columns, columns], *shared)
    torch.testing.assert_close(both, torch.cat([x @ weight.t() for weight in weights], 1))
    assert [name for name, _ in calls] == ["linear", *(["linear"] * 2 if backend == "cpp" else ["linear_group"])]
    assert all(how == {"execution": "split", "precision": "exact"} for _, how in calls)


def test_choices() -> None:
    with pytest.raises(AlignvecError, match="execution='guess' is not one of auto, split, combine, materialise"):
        planner.check_choice("execution", "guess", planner.EXECUTIONS)


def test_env_says_why_a_backend_is_not_live(built: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(backend: str) -> str:
        lines = CliRunner().invoke(app, ["env"], env={"COLUMNS": "400"}).output.splitlines()
        return next(line for line in lines if f"backend {backend} " in line).split(maxsplit=2)[2]

    assert set(backends.BACKENDS) == {name for name, _ in explain.backends()}
    assert shown("cpp").strip() == "not live: csrc/cpu is not built"
    assert shown("torch").strip() == "live"
    assert shown("auto").startswith("torch on CPUs")
    monkeypatch.setattr(explain, "cpu_capability", lambda: "avx512_bf16")
    built("cpu")
    assert shown("cpp").strip() == "live, runs avx512_bf16"
    assert shown("auto").startswith("cpp on CPUs")
    monkeypatch.setenv("ALIGNVEC_BACKEND", "triton")
    planner.resolve_backend.cache_clear()
    if not torch.cuda.is_available():
        assert shown("triton").startswith("not live: it needs a GPU")
        assert shown("auto").startswith("backend 'triton' cannot run on cpu")
