"""Operations that act on each weight by itself: threads read, compute and round pieces of the deltas, in order.

A dense result is written as the vectors are read; of any other format one tensor of each result is in memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from alignvec.checkpoint import TensorInfo
from alignvec.deltas import STEP, dense_header
from alignvec.description import STEM, Error, describe
from alignvec.errors import AlignvecError
from alignvec.formats import finite
from alignvec.progress import bytes_bar
from alignvec.sources import in_order
from alignvec.streaming import MemoryWriter
from alignvec.surgery.streamed import (
    Storage,
    Vectors,
    asked_for,
    computed_in,
    folders_of,
    make_whole,
    recorded,
    total,
)
from alignvec.vector import AlignmentVector
from alignvec.writer import ShardWriter

# A parameter's name and the same flat stretch of every vector (zeros where one has none) to that of every result. What
# is given may be a vector's own memory: it is not written to.
EachWeight: TypeAlias = Callable[[str, list[Tensor]], Sequence[Tensor]]
PART = 1 << 16  # values computed at a time, so few that intermediates stay in cache


def make_by_pieces(
    vectors: Mapping[str, AlignmentVector],
    names: Sequence[str],
    compute: EachWeight,
    source: Mapping[str, Any],
    storage: Storage,
    inputs: Vectors,
) -> dict[str, AlignmentVector]:
    """As ``streamed.make``, of an operation that computes every weight from the same weight of the vectors alone."""
    run = _Run(vectors, len(names), compute, torch.device(storage.get("device", "cpu")))
    spec, dtype = asked_for(storage)
    if spec not in (None, "dense"):
        return make_whole(vectors, names, run.whole, source, storage, inputs)
    output = storage.get("output")
    stored = {name: TensorInfo(dtype or computed_in(info), info.shape) for name, info in run.tensors.items()}
    source, base = recorded(source, vectors), total(vectors).base
    with contextlib.ExitStack() as stack:
        if output is None:
            memory = [MemoryWriter() for _ in names]
            errors = run.stream(stored, memory, progress=storage.get("progress", False))
            kept = [{name: result.tensors[name] for name in e} for result, e in zip(memory, errors, strict=True)]
            return {
                name: AlignmentVector(kept[i], base, format=spec, source=source, errors=errors[i])
                for i, name in enumerate(names)
            }
        folders, limit = folders_of(stack, Path(output), names, storage, inputs), storage.get("max_shard_size", "5GB")
        writers = [stack.enter_context(ShardWriter(folder, STEM, stored, limit)) for folder in folders]
        errors = run.stream(stored, writers, progress=storage.get("progress", False))
        for i, (folder, writer) in enumerate(zip(folders, writers, strict=True)):
            writer.close()
            headers = {name: dense_header(stored[name].shape) for name in errors[i]}
            describe(folder, headers, base, "dense", source, errors[i])
    return {name: AlignmentVector.load(Path(output) / name) for name in names}


@dataclass
class _Piece:
    """A stretch of a result as it will be stored, and what is known of the values before they were rounded."""

    values: Tensor
    some: bool = False  # whether any is not zero
    square: float = 0.0
    error: float = 0.0  # the sum of the squares of what rounding changed

    @classmethod
    def empty(cls, size: int, dtype: torch.dtype) -> _Piece:
        return cls(torch.empty(size, dtype=dtype))

    def put(self, part: slice, exact: Tensor) -> None:
        rounded, precise = self.values[part].copy_(exact), exact.double()
        square = float(torch.dot(precise, precise))
        self.square += square
        self.some = self.some or square != 0 or bool(exact.any())
        if rounded.dtype != exact.dtype:
            lost = precise - rounded
            self.error += float(torch.dot(lost, lost))

    def add(self, other: _Piece) -> None:
        """Count another stretch to this one; values stay as they are."""
        self.some = self.some or other.some
        self.square += other.square
        self.error += other.error


class _Run:
    def __init__(
        self, vectors: Mapping[str, AlignmentVector], results: int, compute: EachWeight, device: torch.device
    ) -> None:
        self.vectors, self.results, self.compute, self.device = list(vectors.values()), results, compute, device
        self.tensors = total(vectors).tensors

    def stream(
        self, stored: Mapping[str, TensorInfo], writers: Sequence[ShardWriter | MemoryWriter], *, progress: bool
    ) -> list[dict[str, Error]]:
        """Give the results to their writers, but for deltas that are zero; what rounding lost of every other one."""
        found: list[dict[str, Error]] = [{} for _ in writers]
        order = sorted(stored, key=lambda name: -stored[name].dtype.itemsize)
        jobs = (job for name in order for job in self._jobs(name, stored[name].dtype))
        size = sum(info.nbytes for info in self.tensors.values())
        with (
            bytes_bar("computing", size, shown=progress) as advance,
            contextlib.closing(in_order(jobs)) as results,
        ):
            for name in order:
                info = self.tensors[name]
                for writer in writers:
                    writer.begin(name, stored[name].dtype, info.shape)
                made = [_Piece.empty(0, stored[name].dtype) for _ in writers]  # the sums of the pieces
                for start in range(0, info.numel, STEP):
                    for writer, whole, piece in zip(writers, made, next(results), strict=True):
                        writer.write(piece.values)
                        whole.add(piece)
                    advance(min(STEP, info.numel - start) * info.dtype.itemsize)
                for writer, whole, errors in zip(writers, made, found, strict=True):
                    if whole.some:
                        writer.end()
                        errors[name] = Error.of(whole.error, whole.square)
                    else:
                        writer.roll_back()
        return [{name: errors[name] for name in stored if name in errors} for errors in found]

    def whole(self, name: str, info: TensorInfo) -> list[Tensor]:
        """A parameter's delta of every result."""
        made = [torch.empty(info.numel, dtype=computed_in(info)) for _ in range(self.results)]
        with contextlib.closing(in_order(self._jobs(name, computed_in(info)))) as results:
            for number, pieces in enumerate(results):
                for out, piece in zip(made, pieces, strict=True):
                    out[number * STEP : (number + 1) * STEP] = piece.values
        return [out.view(info.shape).to(self.device) for out in made]

    def _jobs(self, name: str, dtype: torch.dtype) -> Iterator[Callable[[int], list[_Piece]]]:
        numel = self.tensors[name].numel
        for start in range(0, numel, STEP):
            yield partial(self._pieces, name, start, min(start + STEP, numel), dtype)

    def _pieces(self, name: str, start: int, stop: int, dtype: torch.dtype, slot: int) -> list[_Piece]:
        given = [vector.read(name, start, stop) if name in vector else None for vector in self.vectors]
        made = [_Piece.empty(stop - start, dtype) for _ in range(self.results)]
        for first in range(0, stop - start, PART):
            part = slice(first, min(first + PART, stop - start))
            deltas = [self._moved(values, part, computed_in(self.tensors[name])) for values in given]
            for piece, exact in zip(made, self.compute(name, deltas), strict=True):
                piece.put(part, exact.cpu())
        for piece in made:
            if not math.isfinite(piece.square + piece.error) and not finite(piece.values):
                raise AlignvecError(f"delta {name} of the result leaves the range of {dtype}: choose a wider dtype")
        return made

    def _moved(self, values: Tensor | None, part: slice, dtype: torch.dtype) -> Tensor:
        if values is None:
            return torch.zeros(part.stop - part.start, dtype=dtype, device=self.device)
        return values[part].to(self.device, dtype)
