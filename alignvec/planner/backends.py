"""Where the operators run: compiled C++ or CUDA, Triton, or plain torch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch

from alignvec import compiled
from alignvec.errors import AlignvecError

BACKENDS = ("auto", "triton", "cuda", "cpp", "torch")
EXECUTIONS = ("auto", "split", "combine", "materialise")
PRECISIONS = ("exact", "merged")

# What "auto" takes, the first that runs. "cuda" is not among them until it has been measured on a GPU.
AUTO = {"cpu": ("cpp", "torch"), "cuda": ("triton", "torch")}
# Those that run several layers with the same input in one launch.
GROUPED = ("triton", "cuda")
# The modules that have `linear`, and those of GROUPED `linear_group`.
LINEAR = {
    "triton": "alignvec.kernels.linear",
    "cuda": "alignvec.compiled.cuda",
    "cpp": "alignvec.compiled.cpu",
    "torch": "alignvec.kernels.eager",
}


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that `option` does not have."""
    if value not in allowed:
        raise AlignvecError(f"{option}={value!r} is not one of {', '.join(allowed)}")


def obstacle(device_type: str, backend: str) -> str | None:
    """Why `backend` cannot run on tensors of `device_type`, in a sentence; None where it can."""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the triton package is not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if device_type == "cuda" or interpreted else "it needs a GPU (or TRITON_INTERPRET=1)"
    if backend == "cuda":
        if device_type != "cuda":
            return "it is for tensors on a GPU"
        return compiled.reason("cuda") or obstacle("cuda", "triton")  # which runs what it has no kernels for
    if backend == "cpp":
        return compiled.reason("cpu") if device_type == "cpu" else "it is for tensors on a CPU"
    return None


@functools.cache
def resolve_backend(device_type: str, backend: str = "auto") -> str:
    """The backend that serves `device_type`: "cpp" on CPUs where it is built, "triton" on GPUs, else "torch".

    `ALIGNVEC_BACKEND` replaces "auto". Asking for one that cannot run is an error that says why.
    """
    if backend == "auto":
        backend = os.environ.get("ALIGNVEC_BACKEND", "auto")
        check_choice("ALIGNVEC_BACKEND", backend, BACKENDS)
    if backend == "auto":
        return next(name for name in AUTO.get(device_type, ("torch",)) if obstacle(device_type, name) is None)
    reason = obstacle(device_type, backend)
    if reason is not None:
        raise AlignvecError(f"backend {backend!r} cannot run on {device_type}: {reason}; use backend 'torch'")
    return backend


def beside_linear(device_type: str, backend: str = "auto") -> str:
    """The backend of all operators but linear layers: "cuda" has those alone, and leaves the others to Triton."""
    chosen = resolve_backend(device_type, backend)
    return "triton" if chosen == "cuda" else chosen


@functools.cache
def linear_module(backend: str) -> ModuleType:
    """The module of a backend's linear layers, on first use: importing alignvec imports no kernels."""
    return importlib.import_module(LINEAR[backend])


def linear_kernel(device: torch.device, backend: str) -> Callable[..., torch.Tensor]:
    """The function that runs the linear operator on `device`."""
    function: Callable[..., torch.Tensor] = linear_module(resolve_backend(device.type, backend)).linear
    return function
