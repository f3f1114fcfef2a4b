"""What every operation shares: vectors that belong together in, new ones out, one tensor of each in memory.

`pieces.py` makes results of operations that act on each weight by itself, with less than a tensor in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor

from alignvec import formats
from alignvec.checkpoint import TensorInfo
from alignvec.description import Error, describe, title
from alignvec.encoder import square
from alignvec.errors import AlignvecError
from alignvec.extract import parse_dtype
from alignvec.folders import output_folder
from alignvec.formats import Encoded
from alignvec.inputs import read_from
from alignvec.progress import bytes_bar
from alignvec.spool import Spool
from alignvec.vector import AlignmentVector

Vectors: TypeAlias = Mapping[str, AlignmentVector | str | Path]
# A parameter's name and its delta of every vector (zeros where one has none) to its delta of every result.
Compute: TypeAlias = Callable[[str, list[Tensor]], Sequence[Tensor | Encoded]]
# A parameter's name and what it is to its delta of every result.
Make: TypeAlias = Callable[[str, TensorInfo], Sequence[Tensor | Encoded]]
ONE = ""  # the name of an only result, which lies in the output folder itself
LATER = ("lossless", "auto", "peft")  # formats that look at more than one delta


class Storage(TypedDict, total=False):
    """Where the results of an operation go; every operation takes these keywords.

    ``output``: a folder to write to, as ``alignvec.convert`` does; results of several names go to folders of those
    names within it. Default: in memory. ``format``: how to store them, as in ``alignvec.extract``, but for lossless and
    auto; default: as the operation makes them (low-rank factors, sparse values, else dense). ``dtype``: of dense and
    sparse values; default: float32. ``device``: where to compute; default: the CPU. ``max_shard_size``, ``overwrite``,
    ``progress``: as in ``alignvec.extract``.
    """

    output: str | Path | None
    format: str | None
    dtype: str | torch.dtype | None
    device: str | torch.device
    max_shard_size: int | str
    overwrite: bool
    progress: bool


def opened(vectors: Vectors) -> dict[str, AlignmentVector]:
    """The vectors, folders loaded.

    Raises AlignvecError for no vectors, a lossless one without its base, different bases, or different shapes.
    """
    if not vectors:
        raise AlignvecError("there are no vectors: give at least one, as {name: vector}")
    found = {n: v if isinstance(v, AlignmentVector) else AlignmentVector.load(v) for n, v in vectors.items()}
    for name, vector in found.items():
        if vector.needs_base:
            raise AlignvecError(f"{name} is lossless, steps from its base's values: give vector.with_base(base)")
    total(found)
    return found


def total(vectors: Mapping[str, AlignmentVector]) -> AlignmentVector:
    """The sum of the vectors, computed when it is read."""
    (first, result), *others = vectors.items()
    for name, vector in others:
        try:
            result = result + vector
        except AlignvecError as error:
            raise AlignvecError(f"{first} and {name} do not go together: {error}") from None
    return result


def make(
    vectors: Mapping[str, AlignmentVector],
    names: Sequence[str],
    compute: Compute,
    source: Mapping[str, Any],
    storage: Storage,
    inputs: Vectors,
) -> dict[str, AlignmentVector]:
    """The results called ``names``, made by ``compute`` of each parameter's deltas, float32 (float64 where one is).

    Deltas of a result that are zero are left out. ``source``: what was done, kept with the results. ``inputs``: the
    vectors as they were given, whose folders are not written to. Raises AlignvecError and leaves nothing behind.
    """
    device = torch.device(storage.get("device", "cpu"))

    def whole(name: str, info: TensorInfo) -> Sequence[Tensor | Encoded]:
        wide = computed_in(info)
        return compute(name, [_read(vector, name, info.shape, wide, device) for vector in vectors.values()])

    return make_whole(vectors, names, whole, source, storage, inputs)


def make_whole(
    vectors: Mapping[str, AlignmentVector],
    names: Sequence[str],
    whole: Make,
    source: Mapping[str, Any],
    storage: Storage,
    inputs: Vectors,
) -> dict[str, AlignmentVector]:
    """As ``make``, of a function that reads the deltas itself."""
    spec, dtype = asked_for(storage)
    output = storage.get("output")
    base, tensors = (both := total(vectors)).base, both.tensors
    source = recorded(source, vectors)
    kept: list[dict[str, Encoded]] = [{} for _ in names]
    errors: list[dict[str, Error]] = [{} for _ in names]
    with contextlib.ExitStack() as stack:
        folders = [] if output is None else folders_of(stack, Path(output), names, storage, inputs)
        spools = [stack.enter_context(Spool(folder, storage.get("max_shard_size", "5GB"))) for folder in folders]
        size = sum(info.nbytes for info in tensors.values())
        advance = stack.enter_context(bytes_bar("computing", size, shown=storage.get("progress", False)))
        for parameter, info in tensors.items():
            for i, value in enumerate(whole(parameter, info)):
                if not all(part.any() for part in (value.parts.values() if isinstance(value, Encoded) else [value])):
                    continue
                encoded, error = _stored(value, spec, dtype, parameter)
                if spools:
                    spools[i].write(parameter, encoded)
                    encoded = Encoded(encoded.name, encoded.shape, encoded.options, {})
                kept[i][parameter] = encoded
                if error is not None:
                    errors[i][parameter] = error
            advance(info.nbytes)
        for i, (folder, spool) in enumerate(zip(folders, spools, strict=True)):
            spool.close()
            form = spec or title(kept[i].values())
            describe(folder, kept[i], base, form, source, errors[i], spool.checksums)
    if output is not None:
        return {name: AlignmentVector.load(Path(output) / name) for name in names}
    return {
        name: AlignmentVector(kept[i], base, format=spec, source=source, errors=errors[i])
        for i, name in enumerate(names)
    }


def computed_in(info: TensorInfo) -> torch.dtype:
    """The dtype that a parameter's deltas are computed in."""
    return torch.float64 if info.dtype == torch.float64 else torch.float32


def recorded(source: Mapping[str, Any], vectors: Mapping[str, AlignmentVector]) -> dict[str, Any]:
    """What is kept with the results of an operation: what was done, and where its vectors came from."""
    return {**source, "vectors": {name: vector.source for name, vector in vectors.items()}}


def asked_for(storage: Storage) -> tuple[str | None, torch.dtype | None]:
    """The format and the dtype that were asked for; AlignvecError for a format that needs the whole vector."""
    format, dtype = storage.get("format"), storage.get("dtype")
    if format is not None and format.split(":")[0].strip() in LATER:
        raise AlignvecError(f"format {format!r} needs a vector that is whole: make a dense one, then convert it")
    return None if format is None else str(formats.parse(format)), None if dtype is None else parse_dtype(dtype)


def folders_of(
    stack: contextlib.ExitStack, output: Path, names: Sequence[str], storage: Storage, inputs: Vectors
) -> list[Path]:
    """A folder to write to for each result, as ``output_folder`` gives it."""
    for name in names:
        if name in (".", "..") or "/" in name or "\\" in name:
            raise AlignvecError(f"{name!r} cannot be the name of a folder: give the vector another name")
    taken = [path for v in inputs.values() for path in (read_from(v) if isinstance(v, AlignmentVector) else [Path(v)])]
    overwrite, check = storage.get("overwrite", False), AlignmentVector.load
    return [
        stack.enter_context(output_folder(output / n, overwrite=overwrite, inputs=taken, check=check)) for n in names
    ]


def _read(
    vector: AlignmentVector, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if name not in vector:
        return torch.zeros(shape, dtype=dtype, device=device)
    return vector.read(name).view(shape).to(device, dtype)


def _stored(
    value: Tensor | Encoded, format: str | None, dtype: torch.dtype | None, name: str
) -> tuple[Encoded, Error | None]:
    """A result's delta as it will be kept, on the CPU, and what that lost; None where nothing was asked for."""
    if format is None and isinstance(value, Encoded):
        parts = {key: part.cpu() for key, part in value.parts.items()}
        if dtype is not None and value.name == "sparse":
            parts["values"] = parts["values"].to(dtype)
        encoded = Encoded(value.name, value.shape, value.options, parts)
        formats.check(encoded)
        return encoded, None
    delta = formats.decode(value) if isinstance(value, Encoded) else value
    spec = formats.parse(format or "dense")
    as_is = delta.dim() < 2 or spec.name in ("dense", "sparse")
    made = formats.encode(spec, delta.to(dtype) if dtype is not None and as_is else delta, name=name)
    encoded = Encoded(made.name, made.shape, made.options, {key: part.cpu() for key, part in made.parts.items()})
    return encoded, Error.of(formats.squared_error(encoded, delta.cpu()), square(delta), name)
