"""Two models in, one alignment vector out, in one streamed pass whose memory does not grow with the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignvec.checkpoint import TensorInfo
from alignvec.computed import Difference
from alignvec.deltas import dense_header
from alignvec.description import STEM, describe
from alignvec.encoding import asked_for, encoded_in_memory, write_encoded
from alignvec.errors import AlignvecError
from alignvec.folders import output_folder
from alignvec.formats.steps import Counted
from alignvec.pairing import Plan, alike, match
from alignvec.selection import Patterns, as_patterns, selected
from alignvec.sources import Source, StoredSource, open_source
from alignvec.streaming import CHUNK as CHUNK
from alignvec.streaming import MemoryWriter, Survey, stream
from alignvec.tokenizer_files import tokenizer_record
from alignvec.vector import AlignmentVector
from alignvec.writer import ShardWriter


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
            vector, counted = _survey(left, right, plan, format, source, progress)
            return encoded_in_memory(vector, format, _kept(plan), aligned=right, counted=counted, progress=progress)
        memory = MemoryWriter()
        made = stream(left, right, plan, memory, progress)
        return AlignmentVector(
            memory.tensors, made.identity, format=format, source=source | made.losses, errors=made.errors
        )
    inputs = [side.checkpoint.path for side in (left, right) if isinstance(side, StoredSource)]
    with output_folder(output, overwrite=overwrite, inputs=inputs, check=AlignmentVector.load) as folder:
        if format != "dense":
            vector, counted = _survey(left, right, plan, format, source, progress)
            given = (folder, vector, format, _kept(plan), max_shard_size)
            write_encoded(*given, aligned=right, counted=counted, progress=progress)
        else:
            with ShardWriter(folder, STEM, plan.stored, max_shard_size) as writer:
                made = stream(left, right, plan, writer, progress)
                writer.close()
            headers = {name: dense_header(plan.stored[name].shape) for name in writer.written}
            describe(folder, headers, made.identity, format, source | made.losses, made.errors, made.checksums)
    loaded = AlignmentVector.load(output)
    return loaded.with_base(left, verify=False) if loaded.needs_base else loaded


def _kept(plan: Plan) -> dict[str, torch.dtype]:
    return {name: info.dtype for name, info in plan.stored.items()}


def _survey(
    left: Source, right: Source, plan: Plan, format: str, source: dict[str, Any], progress: bool
) -> tuple[AlignmentVector, dict[str, Counted]]:
    """A first pass that checks both sides and finds the tensors that differ; their deltas are computed when read.

    For lossless it also counts the steps between them."""
    exact = Difference(left, right, list(plan.stored))
    wide = {name: TensorInfo(exact.tensors[name].dtype, info.shape) for name, info in plan.stored.items()}
    survey = Survey()
    bits = format.startswith("lossless")
    made = stream(left, right, dataclasses.replace(plan, stored=wide, bits=bits), survey, progress)
    order = [name for name in left.tensors if name in survey.found]
    return AlignmentVector(Difference(left, right, order), made.identity, source=source), made.counted


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating torch dtype, or its name (``"bfloat16"``)."""
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if parsed not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise AlignvecError(f"dtype {dtype} cannot hold weights: choose float64, float32, float16 or bfloat16")
    assert isinstance(parsed, torch.dtype)
    return parsed
