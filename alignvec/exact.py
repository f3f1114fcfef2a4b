"""Dense deltas that lead from the base to the aligned tensor bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from alignvec.errors import AlignvecError


def exact_delta(name: str, base: Tensor, aligned: Tensor) -> Tensor:
    """A dense delta from which ``restored`` gives the aligned tensor bit for bit, in the base's dtype if that will do,
    else in float32 or float64.

    A zero that changed its sign is told by the smallest number there is, which rounds to that zero.
    """
    for dtype in (base.dtype, torch.float32, torch.float64):
        delta = aligned.to(dtype) - base.to(dtype)
        least = torch.tensor(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, dtype=dtype)
        flipped = (base == 0) & (aligned == 0) & (base.signbit() != aligned.signbit())
        delta = torch.where(flipped, torch.copysign(least, aligned.to(dtype)), delta)
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[aligned.dtype.itemsize]
        if torch.equal(restored(base, delta).view(words), aligned.view(words)):
            return delta
    raise AlignvecError(
        f"no dense delta leads {name} from the base to the aligned model bit for bit: choose another format"
    )


def restored(base: Tensor, delta: Tensor) -> Tensor:
    """``base + delta`` in the base's dtype, where the delta is zero the base's own bits."""
    wide = torch.promote_types(torch.float32, delta.dtype)
    return torch.where(delta == 0, base, (base.to(wide) + delta.to(wide)).to(base.dtype))
