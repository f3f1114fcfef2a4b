"""LoRA of parameters that hold many experts, [experts, ...]: PEFT's `target_parameters`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignvec.errors import AlignvecError


def parameter_delta(layer: Any, a: Tensor, b: Tensor, scale: float, name: str) -> Tensor:
    """The delta of a three-dimensional parameter, float32 [experts, in, out] or [experts, out, in].

    PEFT lays the experts' A below each other, [experts * r, in], and their B side by side with the experts innermost,
    [out, r * experts].

    Args:
        layer: PEFT's wrapper of the parameter, which says how many experts there are and whether out comes before in.
    """
    experts, shape = layer.num_experts, tuple(layer.get_param().shape)
    if experts == 1:
        # PEFT adds the product as it is, which fits the parameter only if out comes first or both are as large.
        delta = (b.float() @ a.float())[None]
    else:
        a = a.float().reshape(experts, -1, a.shape[-1])
        b = b.float().reshape(b.shape[0], -1, experts)
        order = "eoi" if layer._did_swap_in_out_features else "eio"
        delta = torch.einsum(f"ore,eri->{order}", b, a)
    if tuple(delta.shape) != shape:
        raise AlignvecError(f"PEFT's delta for {name} is {list(delta.shape)}, which is no sum with {list(shape)}")
    return delta * scale
