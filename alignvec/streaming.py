"""One pass over two models: deltas go to a writer; the base's identity and what rounding lost are gathered."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignvec.deltas import dense_header, require_finite
from alignvec.description import Error
from alignvec.difference import Tally, difference, same_bytes
from alignvec.errors import AlignvecError
from alignvec.fingerprint import BaseIdentity, Checksum, TensorIdentity, dtype_name, identifying
from alignvec.formats import lossless, steps
from alignvec.formats.steps import Counted, nothing
from alignvec.integrity import checksum_of, meaning
from alignvec.pairing import Plan, require_equal
from alignvec.progress import bytes_bar
from alignvec.sources import SLOTS, Source, in_order
from alignvec.sums import Sums, both_sums
from alignvec.writer import ShardWriter

CHUNK = 1 << 20  # values read at a time from each side: whole blocks of a stored delta's checksum


class Streamed(NamedTuple):
    """What a pass gathers beside the deltas."""

    identity: BaseIdentity
    losses: dict[str, Any]  # what the rounding of the whole lost
    errors: dict[str, Error]  # and that of each tensor
    checksums: dict[str, dict[str, str]]  # of the deltas as a vector's files hold them, for a ShardWriter alone
    counted: dict[str, Counted]  # the steps that lossless would store, for a plan that is about bits


def stream(
    left: Source, right: Source, plan: Plan, writer: ShardWriter | MemoryWriter | Survey, progress: bool
) -> Streamed:
    """One pass over both sides: write the deltas that are not zero."""
    names = [*plan.stored, *plan.integers]
    total = sum(left.tensors[name].nbytes for name in names)
    tally, differing, kept = Tally(), [], 0
    identities: dict[str, TensorIdentity] = {}
    errors: dict[str, Error] = {}
    checksums: dict[str, dict[str, str]] = {}
    counted: dict[str, Counted] = {}
    seeds = _seeds(plan) if isinstance(writer, ShardWriter) else {}
    with (
        bytes_bar("extracting", total, shown=progress) as advance,
        contextlib.closing(in_order(_jobs(left, right, plan, seeds))) as results,
    ):
        for name in names:
            info = left.tensors[name]
            pieces = (next(results) for _ in range(0, info.numel, CHUNK))
            if name in plan.integers:
                if sum(1 for p in _shown(pieces, advance) if p.difference is not None) and name not in plan.left_out:
                    differing.append(name)
                continue
            checksum, narrow, own = Checksum(), Checksum(), Tally()
            writer.begin(name, plan.stored[name].dtype, info.shape)
            digits: list[str] = []
            counts = nothing()
            zeros, found = 0, False  # zeros that come before the first change are not written until there is one
            for piece in _shown(pieces, advance):
                assert piece.sums is not None
                checksum.add(piece.sums[0])
                narrow.add(piece.sums[1])
                if name in plan.left_out:
                    continue
                numel = piece.base.numel()
                if piece.difference is None and not found:
                    zeros += numel
                    continue
                delta, part = piece.difference or (torch.zeros(numel, dtype=plan.stored[name].dtype), Tally())
                if not (part.square and math.isfinite(part.square + part.error)):  # those take in every value
                    require_finite(name, delta)
                for start in range(0, zeros, CHUNK):
                    still = torch.zeros(min(CHUNK, zeros - start), dtype=delta.dtype)
                    writer.write(still)
                    digits.append(_checksum(still, seeds.get(name)))
                writer.write(delta)
                digits.append(piece.digits or _checksum(delta, seeds.get(name)))
                own.add(part)
                counts += piece.counted or nothing()
                zeros, found = 0, True
            tally.add(own)
            if found:
                writer.end()
                errors[name] = Error.of(own.error, own.square, name) if own.square else Error(0.0)
                checksums[name] = {"": "".join(digits)}
                if counts.changed:
                    counted[name] = counts
            else:
                writer.roll_back()
            kept += found
            identities[name] = TensorIdentity(
                info.shape, dtype_name(info.dtype), checksum.hexdigest(), narrow.hexdigest()
            )
    require_equal(left, right, differing)
    if not kept:
        where = " in the tensors that include and exclude leave" if plan.left_out else ""
        raise AlignvecError(f"{left.label} and {right.label} hold the same values{where}: there is nothing to extract")
    for name in plan.alone:
        identities[name] = TensorIdentity.of(
            left.read(name, 0, left.tensors[name].numel).view(left.tensors[name].shape)
        )
    order = [name for name in left.tensors if name in identities]
    identity = BaseIdentity(identifying(left.config), {name: identities[name] for name in order})
    whole = Error.of(tally.error, tally.square, "of the whole")
    source = {"inexact_values": tally.inexact, "rounding_error": whole.relative}
    return Streamed(identity, source, errors, checksums, counted)


class _Piece(NamedTuple):
    """The same stretch of a tensor of both sides."""

    base: Tensor
    sums: tuple[Sums, Sums] | None  # for the base's two checksums, of floating tensors
    difference: tuple[Tensor, Tally] | None  # None where nothing differs
    digits: str = ""  # of the difference's checksum, where one is kept
    counted: Counted | None = None  # the steps, where the plan is about bits and both sides have 16 of one dtype


def _seeds(plan: Plan) -> dict[str, int]:
    """What begins the checksum of each delta that may be stored."""
    return {
        name: meaning(name, dense_header(info.shape), "", info.dtype, info.shape)
        for name, info in plan.stored.items()
        if name not in plan.left_out
    }


def _checksum(delta: Tensor, seed: int | None) -> str:
    return "" if seed is None else checksum_of(delta, seed)


def _shown(pieces: Iterator[_Piece], advance: Callable[[int], None]) -> Iterator[_Piece]:
    for piece in pieces:
        yield piece
        advance(piece.base.nbytes)


def _jobs(left: Source, right: Source, plan: Plan, seeds: Mapping[str, int]) -> Iterator[Callable[[int], _Piece]]:
    """Jobs that read a piece of both sides into the slot's buffers, subtract, and hash the difference.

    ``seeds``: of the deltas whose checksums are kept."""
    names = [*plan.stored, *plan.integers]
    kinds = [side[name].dtype for side in (left.tensors, right.tensors, plan.stored) for name in names if name in side]
    width = max((kind.itemsize for kind in kinds), default=1)
    longest = min(CHUNK, max((left.tensors[name].numel for name in names), default=0))
    buffers = [torch.empty(3, -(-longest * width // 8) * 8, dtype=torch.uint8) for _ in range(SLOTS)]

    def job(slot: int, name: str, start: int, stop: int) -> _Piece:
        mine = left.read(name, start, stop, buffers[slot][0])
        sums = both_sums(mine) if name in plan.stored else None  # while the values are in the cache
        theirs = right.read(name, start, stop, buffers[slot][1])
        if name in plan.stored:
            if plan.bits and mine.dtype == theirs.dtype and lossless.takes(mine.dtype):
                counted = steps.count(mine, theirs)
                if not counted.changed:
                    return _Piece(mine, sums, None)
                if math.isfinite(counted.square):  # no delta: a plan about bits comes with a Survey, which wants none
                    return _Piece(mine, sums, (mine, Tally(square=counted.square)), counted=counted)
            result = difference(mine, theirs, plan.stored[name].dtype, buffers[slot][2])
            if result is None and plan.bits and not (mine.dtype == theirs.dtype and same_bytes(mine, theirs)):
                result = torch.zeros(mine.numel(), dtype=plan.stored[name].dtype), Tally()
            return _Piece(mine, sums, result, "" if result is None else _checksum(result[0], seeds.get(name)))
        return _Piece(mine, sums, None if torch.equal(mine, theirs) else (theirs, Tally()))

    for name in names:
        numel = left.tensors[name].numel
        for start in range(0, numel, CHUNK):
            yield partial(job, name=name, start=start, stop=min(start + CHUNK, numel))


class MemoryWriter:
    """Takes what a ShardWriter takes and keeps it."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._name, self._shape, self._position = name, shape, 0
        self._flat = torch.empty(math.prod(shape), dtype=dtype)

    def write(self, values: Tensor) -> None:
        self._flat[self._position : self._position + values.numel()] = values
        self._position += values.numel()

    def end(self) -> None:
        self.tensors[self._name] = self._flat.view(self._shape)

    def roll_back(self) -> None:
        pass


class Survey:
    """Takes what a ShardWriter takes and remembers which tensors came."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._name = name

    def write(self, values: Tensor) -> None:
        pass

    def end(self) -> None:
        self.found.add(self._name)

    def roll_back(self) -> None:
        pass
