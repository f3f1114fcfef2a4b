"""From deltas to a format, tensor by tensor: the tensor at hand is in memory, the others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from alignvec import formats
from alignvec.deltas import STEP, BaseValues
from alignvec.description import Error, describe
from alignvec.errors import AlignvecError
from alignvec.formats import Encoded, Spec, auto, sparse
from alignvec.progress import bytes_bar
from alignvec.sources import Source, in_order
from alignvec.spool import Spool
from alignvec.untrusted import require_memory
from alignvec.vector import AlignmentVector


def asked_for(format: str) -> str:
    """The format as it is kept with a vector, every option spelled out; AlignvecError for one that does not exist."""
    return format.strip() if auto.fraction(format) is not None else str(formats.parse(format))


def write_encoded(
    folder: Path,
    vector: AlignmentVector,
    format: str | None,
    kept: Mapping[str, torch.dtype],
    max_shard_size: int | str,
    *,
    base: BaseValues | None = None,
    aligned: Source | None = None,
    progress: bool = False,
) -> None:
    """The vector in a format, as the files of a folder; see ``encode_all``."""
    headers, errors = {}, {}
    with Spool(folder, max_shard_size) as spool:
        for name, encoded, error in encode_all(vector, format, kept, base=base, aligned=aligned, progress=progress):
            spool.write(name, encoded)
            headers[name] = Encoded(encoded.name, encoded.shape, encoded.options, {})
            if error is not None:
                errors[name] = error
        spool.close()
    describe(folder, headers, vector.base, vector.format if format is None else format, vector.source, errors)


def encoded_in_memory(
    vector: AlignmentVector,
    format: str | None,
    kept: Mapping[str, torch.dtype],
    *,
    base: BaseValues | None = None,
    aligned: Source | None = None,
    progress: bool = False,
) -> AlignmentVector:
    """The vector in a format; see ``encode_all``."""
    deltas, errors = {}, {}
    for name, encoded, error in encode_all(vector, format, kept, base=base, aligned=aligned, progress=progress):
        deltas[name] = encoded
        if error is not None:
            errors[name] = error
    made = AlignmentVector(deltas, vector.base, format=format, source=vector.source, errors=errors)
    base = vector.base_values if base is None else base
    return made.with_base(base.source, verify=False) if made.needs_base and base is not None else made


def encode_all(
    vector: AlignmentVector,
    format: str | None,
    kept: Mapping[str, torch.dtype],
    *,
    base: BaseValues | None = None,
    aligned: Source | None = None,
    progress: bool = False,
) -> Iterator[tuple[str, Encoded, Error | None]]:
    """Every delta in the format (None: the one that it has), and what that lost.

    A delta that is in the format already is passed on as it is.

    ``kept``: the dtype of values that the format stores as they are (dense and sparse). ``base``: the base's values,
    which lossless needs; default: what the vector is bound to. ``aligned``: the aligned model, where there is one:
    lossless then keeps its bits. Sparse by TIES, and auto, look at all deltas before the first is encoded.
    """
    run = _Run(vector, kept, vector.base_values if base is None else base, aligned)
    total = sum(info.nbytes for info in vector.tensors.values())
    with bytes_bar("measuring", total, shown=progress and str(format).startswith("auto:")) as advance:
        specs = run.specs(format, advance)
    with bytes_bar("encoding", total, shown=progress) as advance:
        for name, info in vector.tensors.items():
            if _has(vector.format_of(name), specs[name]):
                yield name, vector.encoded(name), vector.errors.get(name)
            else:
                yield name, *run.encode(name, specs[name])
            advance(info.nbytes)


def _has(found: Spec, asked: Spec) -> bool:
    """Whether a tensor is in the format already; 0 and "" leave an option to the encoder."""
    return found.name == asked.name != "dense" and all(
        value in (0, "", found.options.get(key)) for key, value in asked.options.items()
    )


class _Run:
    def __init__(
        self,
        vector: AlignmentVector,
        kept: Mapping[str, torch.dtype],
        base: BaseValues | None,
        aligned: Source | None,
    ) -> None:
        self.vector, self.kept, self.base, self.aligned = vector, kept, base, aligned

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
            delta, base, aligned = self._values(name, lossless=self.base is not None)
            choices[name] = auto.measure(delta.to(self.kept[name]), base, name, aligned=aligned)
            advance(info.nbytes)
        dense = sum(info.numel * self.kept[name].itemsize for name, info in self.vector.tensors.items())
        return auto.choose(choices, int(share * dense))

    def encode(self, name: str, spec: Spec) -> tuple[Encoded, Error]:
        lossless = spec.name == "lossless"
        delta, base, aligned = self._values(name, lossless)
        stored = delta
        if delta.dim() < 2 or not delta.numel() or spec.name in ("dense", "sparse"):
            stored = delta.to(self.kept[name])
            if lossless and base is not None and aligned is not None:
                stored = exact_delta(name, base, aligned)
        encoded = formats.encode(spec, stored, base, name, aligned=aligned)
        if encoded.name == "lossless":
            return encoded, Error.of(0.0, _square(delta))
        return encoded, Error.of(formats.squared_error(encoded, delta), _square(delta))

    def _values(self, name: str, lossless: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The delta in float32 (or wider); for lossless the base and, where there is one, the aligned tensor, too."""
        info = self.vector.tensors[name]
        if not lossless:
            return _whole(self.vector.read, name, info.numel, info.dtype).view(info.shape), None, None
        there = None if self.base is None else self.base.info(name)
        if self.base is None or there is None:
            raise AlignvecError(f"lossless stores steps from the base's values, and none is known for {name}: give it")
        base = _whole(self.base.read, name, info.numel, there.dtype).view(info.shape)
        if self.aligned is None:
            return _whole(self.vector.read, name, info.numel, info.dtype).view(info.shape), base, None
        after = self.aligned.tensors[name].dtype
        aligned = _whole(self.aligned.read, name, info.numel, after).view(info.shape)
        return aligned.to(info.dtype) - base, base, aligned

    def _matrices(self) -> Iterator[Tensor]:
        """Pieces of the deltas that sparse would store, in the dtype that it would store."""
        for name, info in self.vector.tensors.items():
            if len(info.shape) > 1:
                for piece in self.vector.chunks(name):
                    yield piece.to(self.kept[name])


def _whole(read: Callable[[str, int, int], Tensor], name: str, numel: int, dtype: torch.dtype) -> Tensor:
    """A tensor, flat, its pieces read by several threads."""
    require_memory(numel * dtype.itemsize, f"the values of {name}")
    out = torch.empty(numel, dtype=dtype)

    def job(slot: int, start: int, stop: int) -> None:
        out[start:stop] = read(name, start, stop)

    for _ in in_order(partial(job, start=start, stop=min(start + STEP, numel)) for start in range(0, numel, STEP)):
        pass
    return out


def _square(delta: Tensor) -> float:
    flat = delta.reshape(-1)
    return sum(float(flat[start : start + STEP].double().square().sum()) for start in range(0, flat.numel(), STEP))


def exact_delta(name: str, base: Tensor, aligned: Tensor) -> Tensor:
    """A dense delta from which ``restored`` gives the aligned tensor bit for bit, in the base's dtype if that will do,
    else in float32 or float64.

    A zero that changed its sign is told by the smallest number there is, which rounds to that zero.
    """
    for dtype in (base.dtype, torch.float32, torch.float64):
        delta = aligned.to(dtype) - base.to(dtype)
        least = torch.tensor(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, dtype=dtype)
        flipped = (base == 0) & (aligned == 0) & (base.signbit() != aligned.signbit())
        delta = torch.where(flipped, torch.copysign(least, aligned.to(dtype)), delta)
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[aligned.dtype.itemsize]
        if torch.equal(restored(base, delta).view(words), aligned.view(words)):
            return delta
    raise AlignvecError(
        f"no dense delta leads {name} from the base to the aligned model bit for bit: choose another format"
    )


def restored(base: Tensor, delta: Tensor) -> Tensor:
    """``base + delta`` in the base's dtype, where the delta is zero the base's own bits."""
    wide = torch.promote_types(torch.float32, delta.dtype)
    return torch.where(delta == 0, base, (base.to(wide) + delta.to(wide)).to(base.dtype))
