"""One tensor of a vector at a time into a format, and what that lost; rows are encoded by several threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from alignvec import formats
from alignvec.deltas import STEP, BaseValues
from alignvec.description import Error
from alignvec.errors import AlignvecError
from alignvec.exact import exact_delta
from alignvec.formats import Encoded, Spec, auto, lossless, sparse
from alignvec.formats.spec import BLOCK, matrix
from alignvec.formats.steps import Counted
from alignvec.sources import Source, in_order, one_thread
from alignvec.untrusted import require_memory
from alignvec.vector import AlignmentVector

BY_ROWS = ("dense", "int8", "int4", "sign", "lossless")  # formats that encode a row without looking at others
READ = 1 << 18  # values that a thread reads and encodes at a time
Values = tuple[Tensor, Tensor | None, Tensor | None]  # the delta; for lossless the base's and the aligned model's
T = TypeVar("T")


class Encoder:
    """Encodes the deltas of a vector; see ``encoding.encode_all`` for what it is given."""

    def __init__(
        self,
        vector: AlignmentVector,
        kept: Mapping[str, torch.dtype],
        base: BaseValues | None,
        aligned: Source | None,
        counted: Mapping[str, Counted] | None = None,
    ) -> None:
        self.vector, self.kept, self.base, self.aligned = vector, kept, base, aligned
        self.counted = counted or {}

    def specs(self, format: str | None, advance: Callable[[int], None]) -> dict[str, Spec]:
        """Which format each tensor gets."""
        if format is None:
            return {name: self.vector.format_of(name) for name in self.vector}
        share = auto.fraction(format)
        if share is None:
            spec = formats.parse(format)
            if spec.options.get("method") == "ties" and not spec.options["threshold"]:
                least = sparse.threshold(self._matrices, float(spec.options["density"]))
                spec = Spec(spec.name, {**spec.options, "threshold": least})
            return dict.fromkeys(self.vector.names, spec)
        choices = {}
        for name, info in self.vector.tensors.items():
            choices[name] = self._choices(name)
            advance(info.nbytes)
        dense = sum(info.numel * self.kept[name].itemsize for name, info in self.vector.tensors.items())
        return auto.choose(choices, int(share * dense))

    def encode(self, name: str, spec: Spec) -> tuple[Encoded, Error]:
        """The delta in the format, and what that lost. Those of one dimension, and empty ones, are dense."""
        is_matrix = self._is_matrix(name)
        if is_matrix and spec.name in BY_ROWS:
            with one_thread():
                return self._by_rows(name, spec)
        delta, base, aligned = self._whole(name, lossless=spec.name == "lossless")
        stored = delta.to(self.kept[name]) if not is_matrix or spec.name == "sparse" else delta
        if base is not None and aligned is not None:
            stored = exact_delta(name, base, aligned)
        encoded = formats.encode(spec, stored, base, name, aligned=aligned)
        return encoded, Error.of(formats.squared_error(encoded, delta), square(delta), name)

    def _by_rows(self, name: str, spec: Spec) -> tuple[Encoded, Error]:
        shape = self.vector.tensors[name].shape
        if spec.name == "lossless" and name in self.counted:
            counted = self.counted[name]
            width = int(spec.options["width"]) or lossless.narrowest(counted.far, *matrix(shape))
            pieces = self._each(name, partial(self._steps, name, width))
            return formats.joined(pieces, shape, name), Error.of(0.0, counted.square, name)
        if spec.name == "lossless" and not spec.options["width"]:
            width = lossless.narrowest(self._far(name), *matrix(shape))
            spec = Spec(spec.name, {**spec.options, "width": width})
        lost = norm = 0.0

        def encoded_pieces() -> Iterator[Encoded]:
            nonlocal lost, norm
            for encoded, error, squares in self._each(name, partial(self._piece, name, spec)):
                lost, norm = lost + error, norm + squares
                yield encoded

        return formats.joined(encoded_pieces(), shape, name), Error.of(lost, norm, name)

    def _piece(self, name: str, spec: Spec, rows: slice) -> tuple[Encoded, float, float]:
        """Those rows encoded, the squared error of that, and the squared norm of the delta."""
        delta, base, aligned = self._rows(name, rows, spec.name == "lossless")
        stored = delta.to(self.kept[name]) if spec.name == "dense" else delta
        encoded = formats.encode(spec, stored, base, name, aligned=aligned)
        error = 0.0 if encoded.name == "lossless" else formats.squared_error(encoded, delta)
        return encoded, error, square(delta)

    def _steps(self, name: str, width: int, rows: slice) -> Encoded:
        """Those rows as steps, which no delta is needed for."""
        cols = self.vector.tensors[name].shape[-1]
        base, aligned = self._pair(name, rows.start * cols, rows.stop * cols)
        assert aligned is not None
        return lossless.packed(base.view(-1, cols), aligned.view(-1, cols), width, (rows.stop - rows.start, cols), name)

    def _far(self, name: str) -> Tensor:
        """How many steps do not fit fields of 1, 2, ... 8 bits: int64 [8]."""

        cols = self.vector.tensors[name].shape[-1]

        def far(rows: slice) -> Tensor:
            start, stop = rows.start * cols, rows.stop * cols
            base, aligned = self._pair(name, start, stop)
            delta = self.vector.read(name, start, stop) if aligned is None else None
            return lossless.far(_view(delta, -1, cols), base.view(-1, cols), _view(aligned, -1, cols), name)

        return torch.stack(list(self._each(name, far))).sum(0)

    def _choices(self, name: str) -> list[auto.Choice]:
        """What each candidate of auto makes of the delta; two or more are tried at a time."""
        delta, base, aligned = self._whole(name, lossless=self.base is not None)
        kept = delta.to(self.kept[name])
        tried = in_order(
            partial(lambda slot, spec: auto.measure(spec, kept, base, name, aligned=aligned), spec=spec)
            for spec in auto.candidates(kept.dim())
        )
        with contextlib.closing(tried) as choices:
            return [choice for choice in choices if choice is not None]

    def _each(self, name: str, job: Callable[[slice], T]) -> Iterator[T]:
        """The job's results for stretches of rows, in their order."""
        rows, cols = matrix(self.vector.tensors[name].shape)
        step = max(1, READ // cols)
        stretches = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
        with contextlib.closing(in_order(partial(lambda slot, own: job(own), own=own) for own in stretches)) as results:
            yield from results

    def _rows(self, name: str, rows: slice, lossless: bool) -> Values:
        """Some rows of a matrix, [n, cols]."""
        cols = self.vector.tensors[name].shape[-1]
        delta, base, aligned = self._read(name, rows.start * cols, rows.stop * cols, lossless)
        return delta.view(-1, cols), _view(base, -1, cols), _view(aligned, -1, cols)

    def _whole(self, name: str, lossless: bool) -> Values:
        """All of a tensor, in its shape and memory of its own, read by several threads."""
        info = self.vector.tensors[name]
        require_memory(info.nbytes, f"the values of {name}")

        def job(slot: int, start: int) -> tuple[int, Values]:
            return start, self._read(name, start, min(start + STEP, info.numel), lossless)

        whole: list[Tensor | None] = []
        with contextlib.closing(
            in_order(partial(job, start=start) for start in range(0, max(info.numel, 1), STEP))
        ) as pieces:
            for start, values in pieces:
                whole = whole or [None if piece is None else piece.new_empty(info.numel) for piece in values]
                for every, piece in zip(whole, values, strict=True):
                    if every is not None and piece is not None:
                        every[start : start + piece.numel()] = piece
        delta, base, aligned = (_view(every, *info.shape) for every in whole)
        assert delta is not None
        return delta, base, aligned

    def _read(self, name: str, start: int, stop: int, lossless: bool) -> Values:
        """Values, flat: the delta in float32 (or wider); for lossless the base's and, where there is one, the aligned
        tensor's, too. What is read may be the memory of a live model or of the vector."""
        if not lossless:
            return self.vector.read(name, start, stop), None, None
        base, aligned = self._pair(name, start, stop)
        if aligned is None:
            return self.vector.read(name, start, stop), base, None
        return aligned.to(self.vector.tensors[name].dtype) - base, base, aligned

    def _pair(self, name: str, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Values of the base and, where there is one, of the aligned tensor."""
        if self.base is None or self.base.info(name) is None:
            raise AlignvecError(f"lossless stores steps from the base's values, and none is known for {name}: give it")
        return self.base.read(name, start, stop), None if self.aligned is None else self.aligned.read(name, start, stop)

    def _matrices(self) -> Iterator[Callable[[], Tensor]]:
        """What reads pieces of the deltas that sparse would store, in the dtype that it would store."""
        for name, info in self.vector.tensors.items():
            if len(info.shape) > 1:
                for start in range(0, info.numel, STEP):
                    yield partial(self._values, name, start, min(start + STEP, info.numel))

    def _values(self, name: str, start: int, stop: int) -> Tensor:
        return self.vector.read(name, start, stop).to(self.kept[name])

    def _is_matrix(self, name: str) -> bool:
        info = self.vector.tensors[name]
        return len(info.shape) > 1 and info.numel > 0


def square(delta: Tensor) -> float:
    """The squared norm, in float64, some values at a time."""
    flat = delta.reshape(-1)
    pieces = (flat[start : start + BLOCK].double() for start in range(0, flat.numel(), BLOCK))
    return sum(float(torch.dot(piece, piece)) for piece in pieces)


def _view(values: Tensor | None, *shape: int) -> Tensor | None:
    return None if values is None else values.view(shape)
