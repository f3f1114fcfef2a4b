"""Which backend runs, and why another does not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch
from typer.testing import CliRunner

from alignvec import AlignvecError, compiled, planner
from alignvec.cli.app import app
from alignvec.kernels import eager
from alignvec.ops import backend as ops_backend
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
    assert planner.beside_linear("cuda", "cuda") == "torch"
    assert ops_backend.kernel(torch.device("cuda"), "cuda", "norm", "rms_norm") is eager.rms_norm


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
