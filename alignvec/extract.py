"""Two models in, one alignment vector out, in one streamed pass whose memory does not grow with the model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignvec import formats
from alignvec.checkpoint import TensorInfo
from alignvec.deltas import require_finite
from alignvec.errors import AlignvecError
from alignvec.fingerprint import BaseIdentity, Checksum, TensorIdentity, dtype_name, identifying, summary
from alignvec.progress import bytes_bar
from alignvec.sources import SLOTS, LiveSource, Source, StoredSource, in_order, open_source
from alignvec.vector import STEM, AlignmentVector, write_description
from alignvec.writer import ShardWriter, output_folder

CHUNK = 1 << 20  # values read at a time from each side
STEP = 1 << 17  # values subtracted at a time
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")


def extract(
    base: str | Path | nn.Module,
    aligned: str | Path | nn.Module,
    *,
    format: str = "dense",
    dtype: str | torch.dtype | None = None,
    output: str | Path | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = False,
) -> AlignmentVector:
    """``aligned - base`` for every floating parameter that differs, with the base's identity.

    ``base`` and ``aligned`` are checkpoint folders, .safetensors files, hub ids or live models, in any mixture. The
    difference is computed in float32 (float64 for float64 weights) and kept in the checkpoints' dtype unless ``dtype``
    says otherwise; ``vector.source`` says how many values that rounded (``inexact_values``) and the
    error it made, relative to the vector's norm (``rounding_error``). With ``output`` the vector is
    written there as it is computed, in bounded memory, and read from there when used; without, it is held in memory.

    Raises AlignvecError, leaving nothing behind, when the two do not have the same tensors, shapes and dtypes, when an
    integer tensor differs, when a delta is NaN or infinite, and when nothing differs at all.
    """
    formats.require(format)
    left, right = open_source(base), open_source(aligned)
    plan = _plan(left, right, None if dtype is None else parse_dtype(dtype))
    source = {"base": left.label, "aligned": right.label}
    if output is None:
        memory = _MemoryWriter()
        identity, tally = _stream(left, right, plan, memory, progress)
        return AlignmentVector(memory.tensors, identity, format=format, source=source | tally)
    inputs = [side.checkpoint.path for side in (left, right) if isinstance(side, StoredSource)]
    with output_folder(output, overwrite=overwrite, inputs=inputs) as folder:
        with ShardWriter(folder, STEM, plan.stored, max_shard_size) as writer:
            identity, tally = _stream(left, right, plan, writer, progress)
            writer.close()
        kept = {name: plan.stored[name] for name in writer.written}
        write_description(folder, kept, identity, format, {}, source | tally)
    return AlignmentVector.load(output)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating torch dtype, or its name (``"bfloat16"``)."""
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if parsed not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise AlignvecError(f"dtype {dtype} cannot hold weights: choose float64, float32, float16 or bfloat16")
    assert isinstance(parsed, torch.dtype)
    return parsed


@dataclass(frozen=True)
class _Plan:
    stored: dict[str, TensorInfo]  # floating tensors to subtract: the delta's dtype and shape, widest dtype first
    integers: list[str]  # tensors that have to be equal


def _plan(left: Source, right: Source, dtype: torch.dtype | None) -> _Plan:
    """Match the two sides by name; AlignvecError names what does not match."""
    ours, theirs = _unshared(left, right)
    if lines := [f"{name} is missing in {right.label}" for name in ours if name not in theirs] + [
        f"{name} is missing in {left.label}" for name in theirs if name not in ours
    ]:
        raise AlignvecError(f"{left.label} and {right.label} hold different tensors: {summary(lines)}")
    lines = [
        f"{name} is {list(info.shape)} in {left.label} and {list(theirs[name].shape)} in {right.label}"
        for name, info in ours.items()
        if info.shape != theirs[name].shape
    ]
    if lines:
        advice = ""
        if any(line.split(" is ")[0].endswith(EMBEDDINGS + HEADS) for line in lines):
            advice = " (was the vocabulary resized? resize the base's embeddings alike and save it before extracting)"
        raise AlignvecError(f"shapes differ: {summary(lines)}{advice}")
    floating = {name: info for name, info in ours.items() if info.dtype.is_floating_point}
    lines = [
        f"{name} is {dtype_name(info.dtype)} in {left.label} and {dtype_name(theirs[name].dtype)} in {right.label}"
        for name, info in ours.items()
        if info.dtype != theirs[name].dtype
        and (dtype is None or info.dtype.is_floating_point != theirs[name].dtype.is_floating_point)
    ]
    if lines:
        raise AlignvecError(f"dtypes differ: {summary(lines)}; pass dtype= to say how the vector is to be kept")
    stored = {name: TensorInfo(dtype or info.dtype, info.shape) for name, info in floating.items()}
    stored = dict(sorted(stored.items(), key=lambda item: -item[1].dtype.itemsize))
    return _Plan(stored, [name for name in ours if name not in floating])


def _unshared(left: Source, right: Source) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Both sides' tensors without what they share with another one: a stored copy of a tied head, a model's buffers."""
    ours, theirs = dict(left.tensors), dict(right.tensors)
    for one, other, tensors in ((left, right, theirs), (right, left, ours)):
        if isinstance(one, LiveSource) and not isinstance(other, LiveSource):
            for name in one.buffers & tensors.keys():
                del tensors[name]
    for head in HEADS:
        holders = [side for side, tensors in ((left, ours), (right, theirs)) if head in tensors]
        tied = [side for side in holders if tied_to(side, head) is not None]
        if len(holders) == 1 and not tied:
            other = right if holders[0] is left else left
            raise AlignvecError(
                f"{head} is stored in {holders[0].label} with values of its own, while {other.label} lacks it (tied to "
                "its embedding): save both models with the same tie_word_embeddings"
            )
        if len(tied) == len(holders) and (len(holders) == 1 or not any(_untied(side.config) for side in holders)):
            ours.pop(head, None)
            theirs.pop(head, None)
    return ours, theirs


def tied_to(source: Source, head: str) -> str | None:
    """The embedding that the tensor ``head`` is an exact copy of, if there is one."""
    info = source.tensors.get(head)
    candidates = [
        name
        for name, other in source.tensors.items()
        if info is not None and name.endswith(EMBEDDINGS) and (other.shape, other.dtype) == (info.shape, info.dtype)
    ]
    for name in candidates:
        if all(torch.equal(*pair) for pair in zip(source.chunks(name), source.chunks(head), strict=True)):
            return name
    return None


def _untied(config: Any) -> bool:
    value = (
        config.get("tie_word_embeddings") if isinstance(config, dict) else getattr(config, "tie_word_embeddings", None)
    )
    return value is False


def _stream(
    left: Source, right: Source, plan: _Plan, writer: ShardWriter | _MemoryWriter, progress: bool
) -> tuple[BaseIdentity, dict[str, Any]]:
    """One pass over both sides: write the deltas that are not zero; return the base's identity and the tally."""
    names = [*plan.stored, *plan.integers]
    total = sum(left.tensors[name].nbytes for name in names)
    tally, differing, kept = Tally(), [], 0
    identities: dict[str, TensorIdentity] = {}
    with (
        bytes_bar("extracting", total, shown=progress) as advance,
        contextlib.closing(in_order(_jobs(left, right, plan))) as results,
    ):
        for name in names:
            info = left.tensors[name]
            pieces = (next(results) for _ in range(0, info.numel, CHUNK))
            if name in plan.integers:
                if sum(1 for base, delta in _shown(pieces, advance) if delta is not None):
                    differing.append(name)
                continue
            checksum = Checksum()
            writer.begin(name, plan.stored[name].dtype, info.shape)
            zeros, found = 0, False  # zeros that come before the first change are not written until there is one
            for base, result in _shown(pieces, advance):
                checksum.update(base)
                if result is None and not found:
                    zeros += base.numel()
                    continue
                delta, part = result or (torch.zeros(base.numel(), dtype=plan.stored[name].dtype), Tally())
                require_finite(name, delta)
                for start in range(0, zeros, CHUNK):
                    writer.write(torch.zeros(min(CHUNK, zeros - start), dtype=delta.dtype))
                writer.write(delta)
                tally.add(part)
                zeros, found = 0, True
            if found:
                writer.end()
            else:
                writer.roll_back()
            kept += found
            identities[name] = TensorIdentity(info.shape, dtype_name(info.dtype), checksum.hexdigest())
    if differing:
        raise AlignvecError(f"integer tensors differ, which no vector can hold: {summary(differing)}")
    if not kept:
        raise AlignvecError(f"{left.label} and {right.label} hold the same values: there is nothing to extract")
    order = [name for name in left.tensors if name in identities]
    identity = BaseIdentity(identifying(left.config), {name: identities[name] for name in order})
    relative = math.sqrt(tally.error / tally.square) if tally.square else 0.0
    return identity, {"inexact_values": tally.inexact, "rounding_error": relative}


Result = tuple[Tensor, "tuple[Tensor, Tally] | None"]


def _shown(pieces: Iterator[Result], advance: Callable[[int], None]) -> Iterator[Result]:
    for piece in pieces:
        yield piece
        advance(piece[0].nbytes)


def _jobs(left: Source, right: Source, plan: _Plan) -> Iterator[Callable[[int], Result]]:
    """Jobs that read a piece of both sides into the slot's buffers and subtract."""
    names = [*plan.stored, *plan.integers]
    kinds = [side[name].dtype for side in (left.tensors, right.tensors, plan.stored) for name in names if name in side]
    width = max((kind.itemsize for kind in kinds), default=1)
    longest = min(CHUNK, max((left.tensors[name].numel for name in names), default=0))
    buffers = [torch.empty(3, -(-longest * width // 8) * 8, dtype=torch.uint8) for _ in range(SLOTS)]

    def job(slot: int, name: str, start: int, stop: int) -> Result:
        mine = left.read(name, start, stop, buffers[slot][0])
        theirs = right.read(name, start, stop, buffers[slot][1])
        if name in plan.stored:
            return mine, difference(mine, theirs, plan.stored[name].dtype, buffers[slot][2])
        return mine, None if torch.equal(mine, theirs) else (theirs, Tally())

    for name in names:
        numel = left.tensors[name].numel
        for start in range(0, numel, CHUNK):
            yield partial(job, name=name, start=start, stop=min(start + CHUNK, numel))


@dataclass
class Tally:
    """What storing a difference lost: how many values were rounded, the squared error, the squared norm."""

    inexact: int = 0
    error: float = 0.0
    square: float = 0.0

    def add(self, other: Tally) -> None:
        self.inexact += other.inexact
        self.error += other.error
        self.square += other.square


def difference(
    base: Tensor, aligned: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> tuple[Tensor, Tally] | None:
    """``aligned - base`` of flat tensors, rounded once to ``dtype``; None where nothing differs.

    ``out``: a uint8 buffer for the result.
    """
    if base.dtype == aligned.dtype and _same_bytes(base, aligned):
        return None
    wide = torch.float64 if torch.float64 in (base.dtype, aligned.dtype, dtype) else torch.float32
    tally, moved = Tally(), False
    size = base.numel() * dtype.itemsize
    delta = (torch.empty(size, dtype=torch.uint8) if out is None else out[:size]).view(dtype)
    one, two = torch.empty(2, min(STEP, base.numel()), dtype=wide)
    for start in range(0, base.numel(), STEP):  # so short that the scratch stays in cache
        piece = slice(start, start + STEP)
        exact, other, stored = one[: base[piece].numel()], two[: base[piece].numel()], delta[piece]
        torch.sub(exact.copy_(aligned[piece]), other.copy_(base[piece]), out=exact)
        moved = any(float(end) for end in stored.copy_(exact).aminmax()) or moved
        if dtype != wide:
            tally.square += float(torch.dot(exact, exact))
            error = torch.sub(exact, other.copy_(stored), out=other)
            if any(float(end) for end in error.aminmax()):
                tally.inexact += int(error.view(torch.int64 if wide == torch.float64 else torch.int32).count_nonzero())
                tally.error += float(torch.dot(error, error))
    return (delta, tally) if moved else None


def _same_bytes(one: Tensor, two: Tensor) -> bool:
    words = torch.uint8 if one.nbytes % 8 or one.data_ptr() % 8 or two.data_ptr() % 8 else torch.int64
    return torch.equal(one.view(words), two.view(words))


class _MemoryWriter:
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
