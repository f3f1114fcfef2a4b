"""Two models in, one alignment vector out, in one streamed pass whose memory does not grow with the model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alignvec.checkpoint import TensorInfo
from alignvec.computed import Difference
from alignvec.deltas import dense_header, require_finite
from alignvec.description import STEM, Error, describe
from alignvec.encoding import asked_for, encoded_in_memory, write_encoded
from alignvec.errors import AlignvecError
from alignvec.fingerprint import BaseIdentity, Checksum, TensorIdentity, dtype_name, identifying, narrowed
from alignvec.pairing import Plan, alike, match, require_equal
from alignvec.progress import bytes_bar
from alignvec.selection import Patterns, as_patterns, selected
from alignvec.sources import SLOTS, Source, StoredSource, in_order, open_source
from alignvec.tokenizer_files import tokenizer_record
from alignvec.vector import AlignmentVector
from alignvec.writer import ShardWriter, output_folder

CHUNK = 1 << 20  # values read at a time from each side
STEP = 1 << 17  # values subtracted at a time


def extract(
    base: str | Path | nn.Module,
    aligned: str | Path | nn.Module,
    *,
    format: str = "dense",
    dtype: str | torch.dtype | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    output: str | Path | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = False,
) -> AlignmentVector:
    """``aligned - base`` for every floating parameter that differs, with the base's identity.

    ``base`` and ``aligned`` are checkpoint folders, .safetensors files, hub ids or live models, in any mixture. The
    difference is computed in float32 (float64 for float64 weights). With ``output`` the vector is written there as it
    is computed, in bounded memory, and read from there when used; without, it is held in memory.

    ``format="dense"`` keeps it in the checkpoints' dtype unless ``dtype`` says otherwise; ``vector.source`` says how
    many values that rounded (``inexact_values``) and the error it made, relative to the vector's norm
    (``rounding_error``). Other formats (``"int4:group=64"``, see ``alignvec.formats``; ``"auto:0.25"``: the least error
    in a quarter of the dense bytes) are encoded tensor by tensor, in a few times the memory of the largest;
    ``vector.errors`` says what each tensor lost. ``"lossless"`` takes 16-bit checkpoints and gives the aligned one back
    bit for bit.

    ``include`` and ``exclude`` keep, or leave out, tensors whose names match a pattern, as in ``vector.select``; the
    base's identity stays whole, and a tensor left out may differ in any way. ``vector.source`` also keeps what the
    aligned model's tokenizer is known by, which ``merge`` compares with its base's.

    Names are the base's, without what a wrapper (torch.compile, DDP, FSDP) puts before them. Tensors that one side
    alone has are passed over where the model does not load them (a rotary table, a multi-token prediction head). A
    live model's buffers count where they differ from the other side's.

    Raises AlignvecError, leaving nothing behind, when the two do not have the same tensors, shapes and dtypes, when an
    integer tensor differs, when one has an unmerged PEFT adapter, when a delta is NaN or infinite, and when nothing
    differs at all.
    """
    format = asked_for(format)
    left = open_source(base, plain=True)
    right = alike(left, open_source(aligned, plain=True))
    plan = match(left, right, None if dtype is None else parse_dtype(dtype))
    source: dict[str, Any] = {"base": left.label, "aligned": right.label} | tokenizer_record(right)
    if as_patterns(include) or as_patterns(exclude):
        names = [*plan.stored, *plan.integers]
        plan = dataclasses.replace(plan, left_out=frozenset(names) - frozenset(selected(names, include, exclude)))
        source["selected"] = [{"include": as_patterns(include), "exclude": as_patterns(exclude)}]
    if output is None:
        if format != "dense":
            vector = _survey(left, right, plan, format, source, progress)
            return encoded_in_memory(vector, format, _kept(plan), aligned=right, progress=progress)
        memory = _MemoryWriter()
        identity, tally, errors = _stream(left, right, plan, memory, progress)
        return AlignmentVector(memory.tensors, identity, format=format, source=source | tally, errors=errors)
    inputs = [side.checkpoint.path for side in (left, right) if isinstance(side, StoredSource)]
    with output_folder(output, overwrite=overwrite, inputs=inputs) as folder:
        if format != "dense":
            vector = _survey(left, right, plan, format, source, progress)
            write_encoded(folder, vector, format, _kept(plan), max_shard_size, aligned=right, progress=progress)
        else:
            with ShardWriter(folder, STEM, plan.stored, max_shard_size) as writer:
                identity, tally, errors = _stream(left, right, plan, writer, progress)
                writer.close()
            headers = {name: dense_header(plan.stored[name].shape) for name in writer.written}
            describe(folder, headers, identity, format, source | tally, errors)
    loaded = AlignmentVector.load(output)
    return loaded.with_base(left, verify=False) if loaded.needs_base else loaded


def _kept(plan: Plan) -> dict[str, torch.dtype]:
    return {name: info.dtype for name, info in plan.stored.items()}


def _survey(
    left: Source, right: Source, plan: Plan, format: str, source: dict[str, Any], progress: bool
) -> AlignmentVector:
    """A first pass that checks both sides and finds the tensors that differ; their deltas are computed when read."""
    exact = Difference(left, right, list(plan.stored))
    wide = {name: TensorInfo(exact.tensors[name].dtype, info.shape) for name, info in plan.stored.items()}
    survey = _Survey()
    bits = format.startswith("lossless")
    identity, _, _ = _stream(left, right, dataclasses.replace(plan, stored=wide, bits=bits), survey, progress)
    order = [name for name in left.tensors if name in survey.found]
    return AlignmentVector(Difference(left, right, order), identity, source=source)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating torch dtype, or its name (``"bfloat16"``)."""
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if parsed not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise AlignvecError(f"dtype {dtype} cannot hold weights: choose float64, float32, float16 or bfloat16")
    assert isinstance(parsed, torch.dtype)
    return parsed


def _stream(
    left: Source, right: Source, plan: Plan, writer: ShardWriter | _MemoryWriter | _Survey, progress: bool
) -> tuple[BaseIdentity, dict[str, Any], dict[str, Error]]:
    """One pass over both sides: write the deltas that are not zero; return the base's identity, what the rounding of
    the whole lost, and of each tensor."""
    names = [*plan.stored, *plan.integers]
    total = sum(left.tensors[name].nbytes for name in names)
    tally, differing, kept = Tally(), [], 0
    identities: dict[str, TensorIdentity] = {}
    errors: dict[str, Error] = {}
    with (
        bytes_bar("extracting", total, shown=progress) as advance,
        contextlib.closing(in_order(_jobs(left, right, plan))) as results,
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
            zeros, found = 0, False  # zeros that come before the first change are not written until there is one
            for piece in _shown(pieces, advance):
                checksum.update(piece.base)
                narrow.update(piece.base if piece.narrowed is None else piece.narrowed)
                if name in plan.left_out:
                    continue
                numel = piece.base.numel()
                if piece.difference is None and not found:
                    zeros += numel
                    continue
                delta, part = piece.difference or (torch.zeros(numel, dtype=plan.stored[name].dtype), Tally())
                require_finite(name, delta)
                for start in range(0, zeros, CHUNK):
                    writer.write(torch.zeros(min(CHUNK, zeros - start), dtype=delta.dtype))
                writer.write(delta)
                own.add(part)
                zeros, found = 0, True
            tally.add(own)
            if found:
                writer.end()
                errors[name] = Error.of(own.error, own.square) if own.square else Error(0.0)
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
    relative = math.sqrt(tally.error / tally.square) if tally.square else 0.0
    return identity, {"inexact_values": tally.inexact, "rounding_error": relative}, errors


class _Piece(NamedTuple):
    """The same stretch of a tensor of both sides."""

    base: Tensor
    narrowed: Tensor | None  # the base's values rounded to float16, where they have another dtype
    difference: tuple[Tensor, Tally] | None  # None where nothing differs


def _shown(pieces: Iterator[_Piece], advance: Callable[[int], None]) -> Iterator[_Piece]:
    for piece in pieces:
        yield piece
        advance(piece.base.nbytes)


def _jobs(left: Source, right: Source, plan: Plan) -> Iterator[Callable[[int], _Piece]]:
    """Jobs that read a piece of both sides into the slot's buffers and subtract."""
    names = [*plan.stored, *plan.integers]
    kinds = [side[name].dtype for side in (left.tensors, right.tensors, plan.stored) for name in names if name in side]
    width = max((kind.itemsize for kind in kinds), default=1)
    longest = min(CHUNK, max((left.tensors[name].numel for name in names), default=0))
    buffers = [torch.empty(3, -(-longest * width // 8) * 8, dtype=torch.uint8) for _ in range(SLOTS)]

    def job(slot: int, name: str, start: int, stop: int) -> _Piece:
        mine = left.read(name, start, stop, buffers[slot][0])
        theirs = right.read(name, start, stop, buffers[slot][1])
        if name in plan.stored:
            result = difference(mine, theirs, plan.stored[name].dtype, buffers[slot][2])
            if result is None and plan.bits and not (mine.dtype == theirs.dtype and _same_bytes(mine, theirs)):
                result = torch.zeros(mine.numel(), dtype=plan.stored[name].dtype), Tally()
            return _Piece(mine, narrowed(mine), result)
        return _Piece(mine, None, None if torch.equal(mine, theirs) else (theirs, Tally()))

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


class _Survey:
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
