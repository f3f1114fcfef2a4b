"""The deltas behind a vector: held as tensors, left in their files, or a linear combination computed when read."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from alignvec.checkpoint import Checkpoint, TensorInfo
from alignvec.errors import AlignvecError

STEP = 1 << 20  # values a pass looks at in one go


class InMemory:
    """Deltas held as tensors, on any device."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = dict(values)
        self.tensors = {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in self.values.items()}
        _require_floating(self.tensors)
        for name, value in self.values.items():
            flat = value.detach().reshape(-1)
            for start in range(0, flat.numel(), STEP):
                require_finite(name, flat[start : start + STEP])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.values[name].detach().reshape(-1)[start:stop].cpu()


class Stored:
    """Deltas that stay in their files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.tensors = checkpoint, checkpoint.tensors
        _require_floating(self.tensors)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        values = self.checkpoint.read(name, start, stop)
        require_finite(name, values)
        return values


class Combination:
    """The sum of factor * deltas, computed when it is read."""

    def __init__(self, terms: list[tuple[float, InMemory | Stored | Combination]]) -> None:
        self.terms = terms
        shapes: dict[str, tuple[int, ...]] = {}
        for _, deltas in terms:
            for name, info in deltas.tensors.items():
                shapes.setdefault(name, info.shape)
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(self._dtype(name), shape) for name, shape in shapes.items()
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        dtype = self.tensors[name].dtype
        total: Tensor | None = None
        for factor, deltas in self.terms:
            if name in deltas.tensors:
                values = deltas.read(name, start, stop).to(dtype)
                total = values * factor if total is None else total.add_(values, alpha=factor)
        assert total is not None
        require_finite(name, total)
        return total

    def _dtype(self, name: str) -> torch.dtype:
        present = [(factor, deltas.tensors[name].dtype) for factor, deltas in self.terms if name in deltas.tensors]
        if len(present) == 1 and abs(present[0][0]) == 1:
            return present[0][1]
        return torch.float64 if any(dtype == torch.float64 for _, dtype in present) else torch.float32


def require_finite(name: str, values: Tensor) -> None:
    """AlignvecError when the delta called ``name`` holds NaN or infinity."""
    if values.numel() and not all(math.isfinite(float(end)) for end in values.aminmax()):
        raise AlignvecError(f"delta {name} holds NaN or infinity: is a checkpoint damaged, or did training diverge?")


def _require_floating(tensors: Mapping[str, TensorInfo]) -> None:
    for name, info in tensors.items():
        if not info.dtype.is_floating_point:
            raise AlignvecError(f"delta {name} is {info.dtype}, but a delta must be a floating tensor")
