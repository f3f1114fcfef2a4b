"""Deltas computed when they are read: linear combinations of others, and the difference of two models."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Self, TypeAlias

import torch
from torch import Tensor

from alignvec.checkpoint import TensorInfo
from alignvec.deltas import BaseValues, InMemory, Stored, as_dense, dense_header, require_finite
from alignvec.formats import Encoded
from alignvec.sources import Source


class _Computed:
    """Deltas that are the values of no file: dense as far as anyone can see."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors
        self.headers = {name: dense_header(info.shape) for name, info in tensors.items()}

    def select(self, names: Iterable[str]) -> Self:
        """The same deltas without those of other names; no value is read."""
        twin = copy.copy(self)
        twin.headers = {name: self.headers[name] for name in names}
        twin.tensors = {name: self.tensors[name] for name in twin.headers}
        return twin

    def read(self, name: str, start: int, stop: int) -> Tensor:
        raise NotImplementedError

    def encoded(self, name: str) -> Encoded:
        info = self.tensors[name]
        return as_dense(self.read(name, 0, info.numel).view(info.shape))

    def layout(self, name: str) -> dict[str, TensorInfo]:
        return {"": self.tensors[name]}


class Combination(_Computed):
    """The sum of factor * deltas, computed when it is read."""

    def __init__(self, terms: list[tuple[float, Deltas]]) -> None:
        self.terms = terms
        shapes: dict[str, tuple[int, ...]] = {}
        for _, deltas in terms:
            for name, info in deltas.tensors.items():
                shapes.setdefault(name, info.shape)
        super().__init__({name: TensorInfo(self._dtype(name), shape) for name, shape in shapes.items()})

    def select(self, names: Iterable[str]) -> Self:
        twin = super().select(names)
        terms = (
            (factor, deltas, [name for name in twin.tensors if name in deltas.tensors]) for factor, deltas in self.terms
        )
        twin.terms = [(factor, deltas.select(own)) for factor, deltas, own in terms if own]
        return twin

    def with_base(self, base: BaseValues) -> Combination:
        return Combination([(factor, deltas.with_base(base)) for factor, deltas in self.terms])

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


class Difference(_Computed):
    """What two models differ by, in float32 (float64 for float64 weights), computed when it is read."""

    def __init__(self, left: Source, right: Source, names: list[str]) -> None:
        self.base, self.right = BaseValues(left), right
        tensors = {}
        for name in names:
            kinds = (left.tensors[name].dtype, right.tensors[name].dtype)
            wide = torch.float64 if torch.float64 in kinds else torch.float32
            tensors[name] = TensorInfo(wide, left.tensors[name].shape)
        super().__init__(tensors)

    def with_base(self, base: BaseValues) -> Difference:
        return self

    def read(self, name: str, start: int, stop: int) -> Tensor:
        dtype = self.tensors[name].dtype
        # Not in place: what a live model's source gives is the model's own memory.
        delta = self.right.read(name, start, stop).to(dtype) - self.base.read(name, start, stop).to(dtype)
        require_finite(name, delta)
        return delta


Deltas: TypeAlias = InMemory | Stored | Combination | Difference
