"""A vector from one format into another, streamed; PEFT's adapters are formats like any other here."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from alignvec.encoding import asked_for, write_encoded
from alignvec.errors import AlignvecError
from alignvec.extract import parse_dtype
from alignvec.folders import output_folder
from alignvec.inputs import read_from
from alignvec.selection import Patterns, as_patterns
from alignvec.vector import AlignmentVector

ADAPTER = "adapter_config.json"


def convert(
    vector: AlignmentVector | str | Path,
    output: str | Path,
    format: str | None = None,
    *,
    base: str | Path | nn.Module | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = False,
) -> AlignmentVector | None:
    """Write a vector, or a PEFT adapter's folder, in another format; gives the vector written, None for an adapter.

    ``format``: as in ``extract``, or ``"peft"``, an adapter that PEFT loads (of low-rank deltas); default: as it is.
    Tensors that have the format already are copied, others are decoded and encoded, one in memory at a time.
    ``include``, ``exclude``: patterns of tensors to keep or leave out, as in ``vector.select``.
    ``base``: the base's values, which lossless is read and written with. ``dtype``: of values stored as they are (dense
    and sparse deltas, norms and biases); default: that of the delta as it is read.

    ``errors`` of the result are relative to the vector given. A vector made lossless from 16-bit norms or biases keeps
    those; ``extract`` from the two checkpoints is what makes it exact. Raises AlignvecError, leaving nothing behind.
    """
    given = _open(vector, base)
    if as_patterns(include) or as_patterns(exclude):
        given = given.select(include, exclude)
    inputs = [Path(vector)] if isinstance(vector, (str, Path)) else []
    if format == "peft":
        from alignvec.peft import to_peft

        to_peft(given, output, base, overwrite=overwrite, inputs=inputs)
        return None
    format = None if format is None else asked_for(format)
    if base is not None:
        given = given.with_base(base)
    elif given.needs_base and not (format or "lossless").startswith("lossless"):
        raise AlignvecError("the vector is lossless, steps from its base's values: give the base to convert it")
    inputs += read_from(given)
    chosen = None if dtype is None else parse_dtype(dtype)
    kept = {name: chosen or info.dtype for name, info in given.tensors.items()}
    with output_folder(output, overwrite=overwrite, inputs=inputs, check=AlignmentVector.load) as folder:
        write_encoded(folder, given, format, kept, max_shard_size, progress=progress)
    converted = AlignmentVector.load(output)
    bound = given.base_values
    return converted.with_base(bound.source, verify=False) if converted.needs_base and bound else converted


def _open(vector: AlignmentVector | str | Path, base: str | Path | nn.Module | None) -> AlignmentVector:
    if isinstance(vector, AlignmentVector):
        return vector
    if (Path(vector) / ADAPTER).is_file():
        from alignvec.peft import from_peft

        return from_peft(vector, base)
    return AlignmentVector.load(vector)
