"""AlignmentVector: named deltas between an aligned model and its base, with arithmetic, norms, load and save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alignvec.base_bits import has_base_bits, unrecorded
from alignvec.checkpoint import Checkpoint, TensorInfo
from alignvec.computed import Combination, Deltas, Difference
from alignvec.deltas import STEP, BaseValues, InMemory, Stored, key
from alignvec.description import STEM, Error, describe, known_format, read_description, title
from alignvec.errors import AlignvecError
from alignvec.fingerprint import BaseIdentity, summary
from alignvec.folders import output_folder, steady
from alignvec.formats import Encoded, Spec
from alignvec.hidden import recover
from alignvec.inputs import read_from
from alignvec.integrity import checksum_of, meaning
from alignvec.numbers import float64_sum
from alignvec.printable import quoted
from alignvec.selection import Patterns, as_patterns, selected
from alignvec.sources import LiveSource, Source, StoredSource, open_source
from alignvec.untrusted import present
from alignvec.writer import ShardWriter, require_apart

if TYPE_CHECKING:
    from alignvec.statistics import LayerStatistics


OF_THE_WHOLE = ("inexact_values", "rounding_error")  # entries of ``source`` that no longer hold for a part


class AlignmentVector:
    """Named deltas: ``W_aligned - W_base`` for every parameter that differs. Immutable.

    A vector that was loaded reads a delta from disk each time it is asked for; a sum, difference or multiple is
    computed then, too, so that no operation holds more than the deltas in use.

    A delta is dense or encoded in a format (`alignvec.formats`); reading decodes it, to float32. Lossless deltas are
    steps from the base's values: they are read through ``with_base``, and stored, copied and attached without.

    A dense delta has the dtype that it is stored in. A factor of exactly 1 keeps the vector as it is, encodings
    included; -1 keeps dense deltas' dtype, being exact; any other sum or multiple, and -1 times an encoded delta, is a
    dense float32 vector (float64 where a float64 delta takes part), since the result of a 16-bit sum is mostly no
    16-bit number.
    """

    def __init__(
        self,
        deltas: Mapping[str, Tensor | Encoded] | Deltas,
        base: BaseIdentity | None = None,
        *,
        format: str | None = None,
        source: Mapping[str, Any] | None = None,
        errors: Mapping[str, Error] | None = None,
    ) -> None:
        """``deltas``: name to floating tensor, or to what a format made of it; not copied. ``base``: which model they
        belong to, if known. ``format``: what the vector was asked to be stored as (``"int4"``, ``"auto:0.25"``);
        default: what its tensors have. ``source``: where they came from, kept with them. ``errors``: what encoding
        them lost, by name.

        Raises AlignvecError for an unknown format, an integer tensor, damaged parts, NaN or infinity, or a delta whose
        name or shape the base does not have.
        """
        if format is not None:
            known_format(format)
        self._deltas = deltas if isinstance(deltas, (InMemory, Stored, Combination, Difference)) else InMemory(deltas)
        self.base = base
        self.format = title(self._deltas.headers.values()) if format is None else format
        self.source, self.errors = dict(source or {}), dict(errors or {})
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
        """Shape and dtype (of the decoded delta) by name, without reading a value."""
        return dict(self._deltas.tensors)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._deltas.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes that the deltas take as they are stored."""
        return sum(self.stored_bytes(name) for name in self)

    def stored_bytes(self, name: str) -> int:
        """Bytes that one delta takes as it is stored."""
        self._require(name)
        return sum(info.nbytes for info in self._deltas.layout(name).values())

    def format_of(self, name: str) -> Spec:
        """The format, with its options, that a delta is stored in."""
        self._require(name)
        return self._deltas.headers[name].spec

    def encoded(self, name: str) -> Encoded:
        """A delta as it is stored, all of its parts read and checked."""
        self._require(name)
        return self._deltas.encoded(name)

    @property
    def verified(self) -> bool:
        """Whether the values come from files and are compared with the checksums there as they are read."""
        return isinstance(self._deltas, Stored) and self._deltas.verified

    @property
    def needs_base(self) -> bool:
        """Whether there are lossless deltas and no base is bound that they could be read with."""
        return bool(_unbound(self._deltas))

    @property
    def base_values(self) -> BaseValues | None:
        """The base that was bound, where one was."""
        return _bound(self._deltas)

    def with_base(self, base: str | Path | nn.Module | Source, *, verify: bool = True) -> AlignmentVector:
        """The same vector, its lossless deltas read as steps from the values of ``base``: a checkpoint or a live model.

        A live model's values are read when a delta is: they have to stay as they are. ``verify`` compares the tensors
        in question with the base's checksums that the vector carries. Raises AlignvecError for a base without those
        tensors, or with other values.
        """
        source = base if isinstance(base, (StoredSource, LiveSource)) else open_source(base)  # type: ignore[arg-type]
        names = _live_names(base, self.names) if isinstance(base, nn.Module) else None
        values = BaseValues(source, names)
        for name in [name for name, header in self._deltas.headers.items() if header.name == "lossless"]:
            info, shape = values.info(name), self._deltas.tensors[name].shape
            if info is None or info.shape != shape:
                there = "no such tensor" if info is None else f"shape {list(info.shape)}"
                raise AlignvecError(
                    f"lossless delta {name} is {list(shape)}, {source.label} has {there}: give its base"
                )
            if verify and self.base is not None and not has_base_bits(self, name, values.read(name, 0, info.numel)):
                if unrecorded(self, name):
                    raise AlignvecError(
                        f"the vector does not record the bits of its base's values ({name}) that its lossless steps "
                        f"are from, so {source.label} cannot be compared with them: extract the vector anew, or give "
                        "its base with verify=False"
                    )
                raise AlignvecError(
                    f"{source.label} is not the base that the vector was extracted from ({name}: other values), "
                    "so its lossless deltas cannot be read with it: give their own base"
                )
        return AlignmentVector(
            self._deltas.with_base(values), self.base, format=self.format, source=self.source, errors=self.errors
        )

    def select(self, include: Patterns = None, exclude: Patterns = None) -> AlignmentVector:
        """The same vector without some of its tensors: the others keep their format, and no value is read.

        ``include``: a pattern of names, or several, of which a tensor has to match one (default: all stay).
        ``exclude``: patterns of which it must match none. Patterns are those of ``fnmatch``: ``"*.mlp.*"``,
        ``["lm_head.*", "*norm*"]``; ``*`` matches dots, too. The base's identity stays whole, so that the result is
        attached to and merged into the same base; tensors left out keep the base's values there.

        Raises AlignvecError for a pattern that matches no tensor, and when no tensor is left.
        """
        kept = selected(self.names, include, exclude)
        source = {key: value for key, value in self.source.items() if key not in OF_THE_WHOLE}
        chosen = {"include": as_patterns(include), "exclude": as_patterns(exclude)}
        before = self.source.get("selected")
        source["selected"] = [*(before if isinstance(before, list) else ()), chosen]
        errors = {name: error for name, error in self.errors.items() if name in kept}
        return AlignmentVector(self._deltas.select(kept), self.base, format=self.format, source=source, errors=errors)

    def __len__(self) -> int:
        return len(self._deltas.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._deltas.tensors

    def __getitem__(self, name: str) -> Tensor:
        """The dense delta, in the parameter's shape. Do not write to it."""
        self._require(name)
        if isinstance(self._deltas, InMemory) and name in self._deltas.dense:
            return self._deltas.dense[name]
        return self.read(name).view(self._deltas.tensors[name].shape)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and delta, one in memory at a time."""
        return ((name, self[name]) for name in self)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Values ``start`` to ``stop`` of the flattened delta, on the CPU; NaN or infinity is an AlignvecError."""
        self._require(name)
        return self._deltas.read(name, start, self._deltas.tensors[name].numel if stop is None else stop)

    def aligned(self, name: str, start: int, stop: int) -> Tensor | None:
        """Values of the aligned tensor as a lossless delta tells them, bit for bit; None for other formats."""
        if self.format_of(name).name != "lossless" or not isinstance(self._deltas, (InMemory, Stored)):
            return None
        return self._deltas.aligned(name, start, stop)

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
        number = _float(factor)
        if not math.isfinite(number):
            raise AlignvecError(f"an alignment vector cannot be multiplied by {quoted(factor)}: choose a finite factor")
        if factor == 1:
            return self
        return AlignmentVector(Combination([(number, self._deltas)]), self.base, source=_adapters(self))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> AlignmentVector:
        if not isinstance(divisor, Real):
            return NotImplemented
        number = _float(divisor)
        if not math.isfinite(number) or number == 0 or not math.isfinite(1.0 / number):
            raise AlignvecError(
                f"an alignment vector cannot be divided by {quoted(divisor)}: choose a divisor that is finite and not 0"
            )
        return self * (1.0 / number)

    def __neg__(self) -> AlignmentVector:
        return self * -1.0

    def dot(self, other: AlignmentVector) -> float:
        """Inner product over all parameters, accumulated in float64; a parameter that one lacks counts as zero.

        Raises AlignvecError where it overflows.
        """
        self._comparable(other)
        total = 0.0
        for name in self:
            if name in other:
                pieces = zip(self.chunks(name), other.chunks(name), strict=True)
                total += sum(float(torch.dot(mine.double(), theirs.double())) for mine, theirs in pieces)
        return float64_sum(total, "the inner product of the vectors")

    def norm(self, name: str | None = None) -> float:
        """Euclidean norm of the whole vector, or of one delta, accumulated in float64. AlignvecError where its square
        overflows."""
        names = self.names if name is None else (name,)
        square = sum(float(piece.double().square().sum()) for each in names for piece in self.chunks(each))
        return math.sqrt(float64_sum(square, f"the norm of {'the vector' if name is None else f'delta {name}'}"))

    def cosine(self, other: AlignmentVector) -> float:
        """Cosine of the angle to another vector; NaN when one of them is zero."""
        mine, theirs = self.norm(), other.norm()
        return self.dot(other) / mine / theirs if mine and theirs else math.nan

    def statistics(self, base: Any = None) -> list[LayerStatistics]:
        """One row a layer (and for embedding, norm, head); ``base``, a path or model, adds the relative norms."""
        from alignvec.statistics import statistics

        return statistics(self, base)

    def save(self, path: str | Path, max_shard_size: int | str = "5GB", *, overwrite: bool = False) -> None:
        """Write a folder of safetensors and ``alignment_vector.json``; it appears whole or not at all.

        ``path`` may be the folder that the vector is read from. Raises AlignvecError when it holds something
        (``overwrite`` replaces a vector or checkpoint, and nothing that the library did not write) or a base that the
        vector needs, for names that safetensors files do not give back, and when the disk is full.
        """
        headers = self._deltas.headers
        parts = [(name, part, info) for name in self for part, info in self._deltas.layout(name).items()]
        parts.sort(key=lambda entry: -entry[2].dtype.itemsize)
        expected: dict[str, TensorInfo] = {}
        for name, part, info in parts:
            require_apart(key(name, part), expected)
            expected[key(name, part)] = info
        inputs = read_from(self, terms=False)
        checksums: dict[str, dict[str, str]] = {name: {} for name in self}
        with (
            output_folder(path, overwrite=overwrite, inputs=inputs, check=type(self).load) as folder,
            ShardWriter(folder, STEM, expected, max_shard_size) as w,
        ):
            for name, part, info in parts:
                w.begin(key(name, part), info.dtype, info.shape)
                seed, digits = meaning(name, headers[name], part, info.dtype, info.shape), ""
                dense = headers[name].name == "dense"
                for piece in self.chunks(name) if dense else [self._part(name, part, checked=bool(checksums[name]))]:
                    digits += checksum_of(piece, seed)
                    w.write(piece)
                checksums[name][part] = digits
                w.end()
            w.close()
            describe(folder, headers, self.base, self.format, self.source, self.errors, checksums)

    def _part(self, name: str, part: str, checked: bool) -> Tensor:
        """One part of a delta, on the CPU; all of them are read and checked, unless they were before."""
        if checked and isinstance(self._deltas, Stored):
            return self._deltas.part(name, part)
        return self.encoded(name).parts[part].cpu()

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True) -> AlignmentVector:
        """Open a saved vector: everything but the values is checked now, values are read and checked when used.

        What is read is compared with the checksums that were written with it, unless ``verify`` is False: the
        description now, values by the first read that needs them. A vector of a version that wrote no checksums is
        read without; ``verified`` says which it is.

        Raises AlignvecError for a folder that is missing, incomplete, corrupted or of a later schema.
        """
        folder = Path(path)
        recover(folder)
        file = folder / f"{STEM}.json"
        with steady(folder):
            if not present(file):
                raise AlignvecError(f"{folder} is no alignment vector: it holds no {file.name}{_instead(folder)}")
            checkpoint, description = Checkpoint.open(folder, stem=STEM), read_description(file, verify=verify)
        try:
            deltas = Stored(checkpoint, description.headers, checksums=description.checksums)
            return cls(
                deltas,
                description.base,
                format=description.format,
                source=description.source,
                errors=description.errors,
            )
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
        bases = (self.base, other.base)
        if bases[0] is not None and bases[1] is not None:
            lines = bases[0].differences(bases[1], here="the first vector's base", there="the second's")
            if lines:
                raise AlignvecError(f"vectors of different bases cannot be added ({summary(lines)})")
        base = self.base if other.base is not None else None
        sum_of = Combination([(1.0, self._deltas), (factor, other._deltas)])
        return AlignmentVector(sum_of, base, source=_adapters(self, other))


def _float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _adapters(*vectors: AlignmentVector) -> dict[str, Any]:
    """Of the sources of vectors, what a sum or multiple keeps: the adapter that one was read from, which decides where
    it may be attached."""
    return next(({"adapter": v.source["adapter"]} for v in vectors if "adapter" in v.source), {})


def _instead(folder: Path) -> str:
    """What a folder that is no vector seems to be, and what makes a vector of that."""
    if (folder / "adapter_config.json").is_file():
        return "; it is a PEFT adapter: alignvec.from_peft, or alignvec convert, makes a vector of it"
    if (folder / "config.json").is_file():
        return "; it is a model: alignvec.extract(base, model) makes a vector of it"
    return "" if folder.exists() else "; there is no such folder"


def _unbound(deltas: Deltas) -> list[str]:
    """The lossless deltas that no base is bound to."""
    if isinstance(deltas, Combination):
        return [name for _, term in deltas.terms for name in _unbound(term)]
    return [name for name, header in deltas.headers.items() if header.name == "lossless" and deltas.base is None]


def _bound(deltas: Deltas) -> BaseValues | None:
    if isinstance(deltas, Combination):
        return next((found for _, term in deltas.terms if (found := _bound(term)) is not None), None)
    return deltas.base


def _live_names(model: nn.Module, names: tuple[str, ...]) -> dict[str, str]:
    """The vector's names to the live model's."""
    from alignvec.names import parameter_names, resolve

    live = parameter_names(model)
    return {name: found for name in names if (found := resolve(model, live, name)) is not None}


def load(path: str | Path, *, verify: bool = True) -> AlignmentVector:
    """Open a saved vector; see ``AlignmentVector.load``."""
    return AlignmentVector.load(path, verify=verify)
