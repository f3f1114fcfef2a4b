"""AlignmentVector: named deltas between an aligned model and its base, with arithmetic, norms, load and save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignvec import formats
from alignvec.checkpoint import Checkpoint, TensorInfo, read_json
from alignvec.deltas import STEP, Combination, InMemory, Stored
from alignvec.errors import AlignvecError
from alignvec.fingerprint import BaseIdentity, summary
from alignvec.writer import ShardWriter, output_folder, write_json

if TYPE_CHECKING:
    from alignvec.statistics import LayerStatistics

STEM = "alignment_vector"  # alignment_vector.safetensors (or its shards and index) and alignment_vector.json
SCHEMA = 1


class AlignmentVector:
    """Named deltas: ``W_aligned - W_base`` for every parameter that differs. Immutable.

    A vector that was loaded reads a delta from disk each time it is asked for; a sum, difference or multiple is
    computed then, too, so that no operation holds more than the deltas in use.

    A vector stores each delta in one dtype. Negation, and a factor of exactly 1 or -1, keep it, being exact; any other
    sum or multiple is float32 (float64 where a float64 delta takes part), since the result of a 16-bit sum is mostly no
    16-bit number.
    """

    def __init__(
        self,
        deltas: Mapping[str, Tensor] | Stored | Combination,
        base: BaseIdentity | None = None,
        *,
        format: str = "dense",
        options: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        """``deltas``: name to floating tensor, not copied. ``base``: which model they belong to, if known.

        ``source``: where they came from, kept with them. Raises AlignvecError for an unknown format, an integer tensor,
        NaN or infinity, or a delta whose name or shape the base does not have.
        """
        formats.require(format)
        self._deltas = deltas if isinstance(deltas, (Stored, Combination)) else InMemory(deltas)
        self.base, self.format = base, format
        self.options, self.source = dict(options or {}), dict(source or {})
        if base is not None:
            for name, info in self._deltas.tensors.items():
                if name not in base.tensors:
                    raise AlignvecError(f"delta {name} belongs to no tensor of the base")
                if info.shape != base.tensors[name].shape:
                    raise AlignvecError(
                        f"delta {name} has shape {list(info.shape)}, the base's tensor {list(base.tensors[name].shape)}"
                    )

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Shape and dtype by name, without reading a value."""
        return dict(self._deltas.tensors)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._deltas.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes that the deltas take as they are stored."""
        return sum(info.nbytes for info in self._deltas.tensors.values())

    def __len__(self) -> int:
        return len(self._deltas.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._deltas.tensors

    def __getitem__(self, name: str) -> Tensor:
        """The dense delta, in the parameter's shape. Do not write to it."""
        self._require(name)
        if isinstance(self._deltas, InMemory):
            return self._deltas.values[name]
        return self.read(name).view(self._deltas.tensors[name].shape)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and delta, one in memory at a time."""
        return ((name, self[name]) for name in self)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Values ``start`` to ``stop`` of the flattened delta, on the CPU; NaN or infinity is an AlignvecError."""
        self._require(name)
        return self._deltas.read(name, start, self._deltas.tensors[name].numel if stop is None else stop)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The flattened delta in pieces."""
        self._require(name)
        numel = self._deltas.tensors[name].numel
        return (self.read(name, start, min(start + STEP, numel)) for start in range(0, numel, STEP))

    def __add__(self, other: AlignmentVector) -> AlignmentVector:
        return self._combine(other, 1.0) if isinstance(other, AlignmentVector) else NotImplemented

    def __sub__(self, other: AlignmentVector) -> AlignmentVector:
        return self._combine(other, -1.0) if isinstance(other, AlignmentVector) else NotImplemented

    def __mul__(self, factor: float) -> AlignmentVector:
        if not isinstance(factor, Real):
            return NotImplemented
        if not math.isfinite(factor):
            raise AlignvecError(f"an alignment vector cannot be multiplied by {factor}: the factor must be finite")
        return AlignmentVector(Combination([(float(factor), self._deltas)]), self.base)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> AlignmentVector:
        if not isinstance(divisor, Real):
            return NotImplemented
        if divisor == 0:
            raise AlignvecError("an alignment vector cannot be divided by zero")
        return self * (1.0 / float(divisor))

    def __neg__(self) -> AlignmentVector:
        return self * -1.0

    def dot(self, other: AlignmentVector) -> float:
        """Inner product over all parameters, accumulated in float64; a parameter that one lacks counts as zero."""
        self._comparable(other)
        total = 0.0
        for name in self:
            if name in other:
                pieces = zip(self.chunks(name), other.chunks(name), strict=True)
                total += sum(float(torch.dot(mine.double(), theirs.double())) for mine, theirs in pieces)
        return total

    def norm(self, name: str | None = None) -> float:
        """Euclidean norm of the whole vector, or of one delta, accumulated in float64."""
        names = self.names if name is None else (name,)
        return math.sqrt(sum(float(piece.double().square().sum()) for each in names for piece in self.chunks(each)))

    def cosine(self, other: AlignmentVector) -> float:
        """Cosine of the angle to another vector; NaN when one of them is zero."""
        norms = self.norm() * other.norm()
        return self.dot(other) / norms if norms else math.nan

    def statistics(self, base: Any = None) -> list[LayerStatistics]:
        """One row a layer (and for embedding, norm, head); ``base``, a path or model, adds the relative norms."""
        from alignvec.statistics import statistics

        return statistics(self, base)

    def save(self, path: str | Path, max_shard_size: int | str = "5GB", *, overwrite: bool = False) -> None:
        """Write a folder of safetensors and ``alignment_vector.json``; it appears whole or not at all.

        Raises AlignvecError when ``path`` holds something (``overwrite`` replaces a vector or checkpoint).
        """
        tensors = dict(sorted(self._deltas.tensors.items(), key=lambda item: -item[1].dtype.itemsize))
        with (
            output_folder(path, overwrite=overwrite) as folder,
            ShardWriter(folder, STEM, tensors, max_shard_size) as w,
        ):
            for name, info in tensors.items():
                w.begin(name, info.dtype, info.shape)
                for piece in self.chunks(name):
                    w.write(piece)
                w.end()
            w.close()
            write_description(folder, tensors, self.base, self.format, self.options, self.source)

    @classmethod
    def load(cls, path: str | Path) -> AlignmentVector:
        """Open a saved vector: everything but the values is checked now, values are read and checked when used.

        Raises AlignvecError for a folder that is missing, incomplete, corrupted or of a later schema.
        """
        folder = Path(path)
        file = folder / f"{STEM}.json"
        if not file.is_file():
            raise AlignvecError(f"{folder} is no alignment vector: it holds no {file.name}")
        checkpoint, data = Checkpoint.open(folder, stem=STEM), read_json(file)
        if data.get("schema") != SCHEMA:
            raise AlignvecError(
                f"{file} has schema {data.get('schema')!r}, this version reads {SCHEMA}: update alignvec"
            )
        shapes = {name: list(info.shape) for name, info in checkpoint.tensors.items()}
        for key, kind in (("format", str), ("options", dict), ("source", dict), ("tensors", dict)):
            if not isinstance(data.get(key), kind):
                raise AlignvecError(f"{file}: {key!r} is missing or malformed")
        for name in sorted(shapes.keys() | data["tensors"].keys()):
            if data["tensors"].get(name) != shapes.get(name):
                raise AlignvecError(
                    f"{file} gives {name} the shape {data['tensors'].get(name)}, the safetensors files "
                    f"{shapes.get(name)}: the vector is incomplete or corrupted"
                )
        try:
            base = None if data.get("base") is None else BaseIdentity.from_json(data["base"])
            return cls(Stored(checkpoint), base, format=data["format"], options=data["options"], source=data["source"])
        except AlignvecError as error:
            raise AlignvecError(f"{file}: {error}") from None

    def __repr__(self) -> str:
        return f"AlignmentVector({len(self)} deltas, {self.nbytes / 1e6:.1f} MB, format={self.format!r})"

    def _require(self, name: str) -> None:
        if name not in self._deltas.tensors:
            raise AlignvecError(f"the alignment vector has no delta named {name!r}")

    def _comparable(self, other: AlignmentVector) -> None:
        for name, info in self._deltas.tensors.items():
            if name in other and other._deltas.tensors[name].shape != info.shape:
                shapes = f"{list(info.shape)} in one vector and {list(other._deltas.tensors[name].shape)} in the other"
                raise AlignvecError(f"delta {name} has shape {shapes}: they belong to different architectures")

    def _combine(self, other: AlignmentVector, factor: float) -> AlignmentVector:
        self._comparable(other)
        if self.base is not None and other.base is not None and (lines := self.base.differences(other.base)):
            raise AlignvecError(f"vectors of different bases cannot be added ({summary(lines)})")
        base = self.base if other.base is not None else None
        return AlignmentVector(Combination([(1.0, self._deltas), (factor, other._deltas)]), base)


def write_description(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    base: BaseIdentity | None,
    format: str,
    options: Mapping[str, Any],
    source: Mapping[str, Any],
) -> None:
    """``alignment_vector.json``: what the safetensors files beside it mean."""
    try:
        version = metadata.version("alignvec")
    except metadata.PackageNotFoundError:
        version = "unknown"
    data = {
        "schema": SCHEMA,
        "alignvec": version,
        "format": format,
        "options": dict(options),
        "source": dict(source),
        "tensors": {name: list(info.shape) for name, info in tensors.items()},
        "base": None if base is None else base.to_json(),
    }
    write_json(folder / f"{STEM}.json", data)


def load(path: str | Path) -> AlignmentVector:
    """Open a saved vector; see ``AlignmentVector.load``."""
    return AlignmentVector.load(path)
