"""A mix of vectors into a checkpoint: streamed, rounded once, with the coefficients that the rounding left."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from alignvec.checkpoint import Checkpoint, TensorInfo
from alignvec.deltas import require_finite
from alignvec.errors import AlignvecError
from alignvec.exact import restored
from alignvec.extract import CHUNK, parse_dtype
from alignvec.fingerprint import dtype_name
from alignvec.folders import nulled, output_folder, write_json
from alignvec.inputs import read_from
from alignvec.numbers import float32_number
from alignvec.owned import REPORT, TEMPLATES
from alignvec.pairing import HEADS, tied_to
from alignvec.progress import bytes_bar
from alignvec.rounding import ROUNDINGS, RealisedCoefficients, mix_
from alignvec.sources import StoredSource, in_order, open_source
from alignvec.stored_base import Digest, bind, knows, require_base
from alignvec.tokenizer_files import TokenizerWarning, copy_tokenizer, notes_on, replacement_for
from alignvec.untrusted import read_json
from alignvec.vector import AlignmentVector
from alignvec.writer import ShardWriter

__all__ = ["MergeReport", "RealisedCoefficients", "merge", "mix_", "require_base"]

WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx")


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote. ``realised``: least squares of the rounded edit on the vectors, against ``requested``.

    ``values``: floating values of the model; ``changed``: those that the merge moved. ``notes``: what it warned of.
    """

    output: Path
    requested: dict[str, float]
    realised: dict[str, float]
    values: int
    changed: int
    rounding: str
    notes: tuple[str, ...] = ()


def merge(
    base: str | Path,
    vectors: Mapping[str, AlignmentVector | str | Path],
    coefficients: Mapping[str, float],
    output: str | Path,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    tokenizer: str | Path | None = None,
    progress: bool = False,
    transfer: bool = False,
    overwrite: bool = False,
) -> MergeReport:
    """Write ``base + sum_i coefficients[i] * vectors[i]`` as a checkpoint that ``from_pretrained`` loads.

    Sums are float32 (float64 for float64 weights) and rounded once to the base's dtype, or to ``dtype``: ``"nearest"``
    or ``"stochastic"`` (16-bit dtypes; unbiased, so that the realised coefficients are right; ``seed`` fixes it).
    The base's shards are kept unless ``max_shard_size`` is given; config, tokenizer and other small files are copied.
    ``tokenizer``: a folder, or a hub id, whose tokenizer and chat template are written instead of the base's. Without
    it, a TokenizerWarning says which vectors come from a model that has another tokenizer than the base, where their
    extraction recorded it. Tensors that a vector leaves out (``vector.select``) keep the base's values.
    ``transfer=True`` allows a base with other values (another fine-tuning stage of the same architecture); a lossless
    vector then needs its own base bound (``vector.with_base``).
    A lossless vector alone at coefficient exactly 1 gives the aligned checkpoint, bit for bit.

    The base may hold tensors that the vector's own base lacks, and lack some that no model loads (masks, rotary
    frequencies, layers of multi-token prediction), as checkpoints of one model do: they are left as they are.

    Raises AlignvecError, leaving nothing behind, for vectors of a different base, a quantised base, unknown or missing
    coefficients, ones that are not finite, a result that overflows, a tokenizer whose tokens the embedding has no rows
    for, and an output that exists (with ``overwrite``: that is, or holds, an input, or holds what the library did not
    write).
    """
    target = None if dtype is None else parse_dtype(dtype)
    if rounding not in ROUNDINGS:
        raise AlignvecError(f"rounding {rounding!r} is not known: choose one of {', '.join(ROUNDINGS)}")
    check_coefficients(vectors, coefficients)
    opened = {name: v if isinstance(v, AlignmentVector) else AlignmentVector.load(v) for name, v in vectors.items()}
    if isinstance(base, nn.Module):
        raise AlignvecError(
            "merge reads a stored base: give its folder; alignment.materialise() merges in a live model"
        )
    source = open_source(base)
    assert isinstance(source, StoredSource)
    requested = {name: float(coefficients[name]) for name in opened}
    for label, vector in opened.items():
        require_base(source, label, vector, values=False)
        opened[label] = bind(source, label, vector, transfer=transfer)
    plan = _Plan(source, opened, target)
    path = source.checkpoint.path
    folder = path if path.is_dir() else path.parent
    replacement = None if tokenizer is None else replacement_for(source, tokenizer)
    notes = () if replacement else notes_on(source.label, folder, opened, requested)
    inputs = [path, *(Path(v) for v in vectors.values() if not isinstance(v, AlignmentVector))]
    inputs += [file for vector in opened.values() for file in read_from(vector)]
    inputs += [] if replacement is None else [replacement]
    with output_folder(output, overwrite=overwrite, inputs=inputs, check=Checkpoint.open) as partial_output:
        with ShardWriter(partial_output, "model", plan.stored, max_shard_size) as writer:
            run = _Run(plan, list(requested.values()), rounding, seed, transfer)
            run.stream(writer, keep_shards=max_shard_size is None and path.is_dir(), progress=progress)
            writer.close()
        realised = dict(zip(opened, run.realised.solve(list(requested.values())), strict=True))
        values = sum(info.numel for info in plan.stored.values() if info.dtype.is_floating_point)
        report = MergeReport(Path(output), requested, realised, values, run.changed, rounding, notes)
        copied = _copy_others(folder, partial_output, target)
        if replacement is not None:
            copy_tokenizer(replacement, partial_output)
        record = {**dataclasses.asdict(report), "base": source.label, "files": copied}
        del record["output"]
        write_json(partial_output / REPORT, nulled(record))
    for note in notes:
        warnings.warn(note, TokenizerWarning, stacklevel=2)
    return report


def check_coefficients(vectors: Mapping[str, object], coefficients: Mapping[str, float]) -> None:
    """One finite coefficient for every vector, or an AlignvecError."""
    if not vectors:
        raise AlignvecError("there is no vector: give at least one")
    for name in coefficients:
        if name not in vectors:
            raise AlignvecError(f"no vector is named {name!r}: there are {', '.join(vectors)}")
    for name in vectors:
        if name not in coefficients:
            raise AlignvecError(f"vector {name!r} has no coefficient: give one, 0 to leave it out")
        float32_number(coefficients[name], "the coefficient of", name)


class _Plan:
    """Which delta of which vector meets which tensor."""

    def __init__(self, source: StoredSource, vectors: dict[str, AlignmentVector], dtype: torch.dtype | None) -> None:
        self.source, self.vectors = source, vectors
        self.stored = {
            name: TensorInfo(dtype if dtype and info.dtype.is_floating_point else info.dtype, info.shape)
            for name, info in source.tensors.items()
        }
        self.tied = {head: embedding for head in HEADS if (embedding := tied_to(source, head)) is not None}

    def deltas(self, name: str) -> dict[int, tuple[AlignmentVector, str]]:
        """The vectors, by number, that edit the tensor, and their name for it: a stored copy of a tied head follows
        its embedding in a vector that knows no head."""
        found = {}
        for number, vector in enumerate(self.vectors.values()):
            known = self.tied[name] if name in self.tied and not knows(vector, name) else name
            if known in vector:
                found[number] = (vector, known)
        return found


class _Run:
    """One pass over the base."""

    def __init__(self, plan: _Plan, coefficients: list[float], rounding: str, seed: int, transfer: bool) -> None:
        self.plan, self.coefficients, self.rounding, self.seed = plan, coefficients, rounding, seed
        self.checked = [] if transfer else [label for label, vector in plan.vectors.items() if vector.base is not None]
        self.realised = RealisedCoefficients(len(coefficients))
        self.changed = 0
        used = [number for number, coefficient in enumerate(coefficients) if coefficient]
        vectors = list(plan.vectors.values())
        alone = len(used) == 1 and coefficients[used[0]] == 1 and not transfer
        self.exact = used[0] if alone and vectors[used[0]].format.startswith("lossless") else None

    def stream(self, writer: ShardWriter, *, keep_shards: bool, progress: bool) -> None:
        stored, source = self.plan.stored, self.plan.source
        shards: dict[str, list[str]] = {}
        for name, info in source.tensors.items():
            assert info.file is not None
            shards.setdefault(info.file.name if keep_shards else "", []).append(name)
        shards = {file: sorted(names, key=lambda name: -stored[name].dtype.itemsize) for file, names in shards.items()}
        total = sum(info.nbytes for info in source.tensors.values())
        order = [name for names in shards.values() for name in names]
        with (
            bytes_bar("merging", total, shown=progress) as advance,
            contextlib.closing(in_order(self._jobs(order))) as results,
        ):
            for file, names in shards.items():
                for name in names:
                    writer.begin(name, stored[name].dtype, stored[name].shape)
                    digest = Digest(name, map(self.plan.vectors.__getitem__, self.checked))
                    for _ in range(0, source.tensors[name].numel, CHUNK):
                        piece = next(results)
                        if self.checked and piece.base.is_floating_point():
                            digest.update(piece.base)
                        writer.write(piece.merged)
                        self.changed += piece.changed
                        self.realised.add(piece.realised)
                        advance(piece.base.nbytes)
                    writer.end()
                    self._verify(name, digest)
                if keep_shards:
                    writer.finish_shard(file)

    def _jobs(self, names: list[str]) -> Iterator[Callable[[int], _Piece]]:
        count = 0
        for name in names:
            numel, found = self.plan.source.tensors[name].numel, self.plan.deltas(name)
            for start in range(0, numel, CHUNK):
                yield partial(self._mix, name, found, start, min(start + CHUNK, numel), count)
                count += 1

    def _mix(
        self, name: str, found: dict[int, tuple[AlignmentVector, str]], start: int, stop: int, number: int, slot: int
    ) -> _Piece:
        base = self.plan.source.read(name, start, stop)
        deltas = {number: vector.read(known, start, stop) for number, (vector, known) in found.items()}
        used = {number: delta for number, delta in deltas.items() if self.coefficients[number]}
        realised = RealisedCoefficients(len(self.coefficients))
        dtype = self.plan.stored[name].dtype
        if not base.is_floating_point() or (not used and dtype == base.dtype):
            out = base
        elif self.exact is not None and dtype == base.dtype:
            vector, known = found[self.exact]
            exact = vector.aligned(known, start, stop)
            out = restored(base, used[self.exact]) if exact is None else exact.to(dtype)
        else:
            generator = _generator(self.seed, number)
            coefficients = [self.coefficients[number] for number in used]
            out = mix_(
                torch.empty(base.shape, dtype=dtype), base, list(used.values()), coefficients, self.rounding, generator
            )
        if used:
            _require_finite(name, base, out)
        if name not in self.plan.tied:
            realised.update(base, out, deltas)
        return _Piece(base, out, realised, 0 if out is base else _changed(base, out))

    def _verify(self, name: str, digest: Digest) -> None:
        for label in self.checked:
            vector = self.plan.vectors[label]
            assert vector.base is not None
            if name in vector.base.tensors and not digest.agrees(vector):
                require_base(self.plan.source, label, vector)  # names all that differ


def _changed(base: Tensor, merged: Tensor) -> int:
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[merged.dtype.itemsize]  # comparing bits is the fastest
    difference = base.view(words) ^ merged.view(words) if base.dtype == merged.dtype else base != merged
    return int(difference.count_nonzero())


def _require_finite(name: str, base: Tensor, merged: Tensor) -> None:
    try:
        require_finite(name, merged)
    except AlignvecError:
        if base.isfinite().all():
            raise AlignvecError(
                f"the mix of {name} is too large for {dtype_name(merged.dtype)}: choose smaller coefficients, or a "
                "wider dtype"
            ) from None
        raise AlignvecError(f"the base's tensor {name} holds NaN or infinity: is its checkpoint damaged?") from None


def _generator(seed: int, number: int) -> torch.Generator:
    """Draws for one piece, unlike those of a plain seed: a model may have been initialised from that one."""
    digest = hashlib.sha256(f"alignvec merge {seed} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@dataclass(frozen=True)
class _Piece:
    base: Tensor
    merged: Tensor
    realised: RealisedCoefficients
    changed: int


def _copy_others(source: Path, target: Path, dtype: torch.dtype | None) -> list[str]:
    """Config, tokenizer and whatever else is no weight; the config says which dtype the weights have now. Gives the
    names of the files that were copied."""
    copied = []
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHTS) and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)
            copied.append(file.name)
    for file in (source / TEMPLATES).glob("*.jinja"):
        if file.is_file():
            (target / TEMPLATES).mkdir(exist_ok=True)
            shutil.copyfile(file, target / TEMPLATES / file.name)
    config = target / "config.json"
    if dtype is not None and config.is_file():
        data = read_json(config)
        for key in [key for key in ("dtype", "torch_dtype") if key in data] or ["dtype"]:
            data[key] = dtype_name(dtype)
        write_json(config, data)
    return copied
