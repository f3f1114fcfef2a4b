"""Where the operators run: Triton or plain torch."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch

from alignvec.errors import AlignvecError

BACKENDS = ("auto", "triton", "torch")
EXECUTIONS = ("auto", "split", "combine", "materialise")
PRECISIONS = ("exact", "merged")


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that `option` does not have."""
    if value not in allowed:
        raise AlignvecError(f"{option}={value!r} is not one of {', '.join(allowed)}")


@functools.cache
def resolve_backend(device_type: str, backend: str = "auto") -> str:
    """The backend that serves `device_type`: "triton" on GPUs that have it, "torch" elsewhere.

    `ALIGNVEC_BACKEND` replaces "auto". Asking for Triton where it cannot run is an error.
    """
    if backend == "auto":
        backend = os.environ.get("ALIGNVEC_BACKEND", "auto")
        check_choice("ALIGNVEC_BACKEND", backend, BACKENDS)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    runs = importlib.util.find_spec("triton") is not None and (device_type == "cuda" or interpreted)
    if backend == "triton" and not runs:
        raise AlignvecError(
            f"backend 'triton' cannot run on {device_type}: it needs the triton package and a GPU "
            "(or TRITON_INTERPRET=1); use backend 'torch'"
        )
    if backend == "auto":
        return "triton" if runs and device_type == "cuda" else "torch"
    return backend


@functools.cache
def _kernel(backend: str) -> Callable[..., torch.Tensor]:
    if backend == "triton":
        from alignvec.kernels import linear

        return linear.linear
    from alignvec.kernels import eager

    return eager.linear


def linear_kernel(device: torch.device, backend: str) -> Callable[..., torch.Tensor]:
    """The function that runs the linear operator on `device`."""
    return _kernel(resolve_backend(device.type, backend))
