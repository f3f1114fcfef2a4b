"""What operators share: the function that runs one on the chosen backend, and gradients."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alignvec import planner

_unsafe_view = torch.ops.aten._unsafe_view.default
CPP = {"eager": "cpu", "eager_step": "cpu_step"}  # modules of alignvec.compiled beside those of kernels


def kernel(device: torch.device, backend: str, family: str, name: str, eager: str = "eager") -> Callable[..., Any]:
    """`name` of a family of operators other than linear layers, as `backend` has it for tensors on `device`.

    eager: the module of its torch version; "cpp" has one for each.
    """
    return _load(planner.beside_linear(device.type, backend), family, name, eager)


@functools.cache
def _load(backend: str, family: str, name: str, eager: str) -> Callable[..., Any]:
    # On first use: importing alignvec does not import triton, nor load a library.
    if backend == "triton":
        module = f"alignvec.kernels.{family}"
    else:
        module = f"alignvec.kernels.{eager}" if backend == "torch" else f"alignvec.compiled.{CPP[eager]}"
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def no_gradients(inputs: tuple[Any, ...]) -> list[Any]:
    """What a backward pass returns for inputs without a gradient: None, and of a list of tensors one for each."""
    lists = (isinstance(value, list) and all(isinstance(item, Tensor) for item in value) for value in inputs)
    return [[None] * len(value) if is_list else None for value, is_list in zip(inputs, lists, strict=True)]


def by_token(t: Tensor) -> Tensor:
    """[..., features] as [tokens, features], of which there may be none."""
    return t.flatten(0, -2) if t.dim() > 1 else t[None]


def unview(y: Tensor, *shape: int) -> Tensor:
    """y in another shape, no view for autograd: callers may write to a layer's result in place, as to torch's own."""
    result: Tensor = _unsafe_view(y, shape)
    return result
