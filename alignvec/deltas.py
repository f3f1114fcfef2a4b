"""The deltas behind a vector: held in memory, or left in their files (`computed.py` has a third kind).

All kinds have `tensors` (decoded dtype and shape), `headers` (the format, without parts), `read` (a flat range of
values), `encoded`, and `layout` (the stored parts). `base` is where lossless deltas find what they are steps from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Self

import torch
from torch import Tensor

from alignvec import formats
from alignvec.checkpoint import Checkpoint, TensorInfo
from alignvec.errors import AlignvecError
from alignvec.formats import Encoded
from alignvec.integrity import Checksums, VerifiedCheckpoint, meaning
from alignvec.sources import Source

STEP = 1 << 20  # values a pass looks at in one go
BY_ROWS = {  # parts of which some rows of a tensor need only the same rows
    "int8": ("codes", "scales"),
    "int4": ("codes", "scales"),
    "sign": ("signs", "scales"),
    "lossless": ("steps",),
    "low-rank": ("B",),
}


class BaseValues:
    """A source's tensors by the names that a vector has for them."""

    def __init__(self, source: Source, names: Mapping[str, str] | None = None) -> None:
        self.source, self.names = source, names

    def info(self, name: str) -> TensorInfo | None:
        return self.source.tensors.get(self._there(name))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        if self.info(name) is None:
            raise AlignvecError(f"{self.source.label}, which should be the vector's base, has no tensor {name}")
        return self.source.read(self._there(name), start, stop)

    def _there(self, name: str) -> str:
        return name if self.names is None else self.names.get(name, name)


class _Leaf:
    """What deltas in memory and in files share: decoding a range of values."""

    headers: dict[str, Encoded]
    tensors: dict[str, TensorInfo]
    base: BaseValues | None

    def _describe(self, headers: dict[str, Encoded], dtypes: Mapping[str, torch.dtype]) -> None:
        self.headers = headers
        self.tensors = {name: TensorInfo(dtypes[name], header.shape) for name, header in headers.items()}

    def with_base(self, base: BaseValues) -> Self:
        """The same deltas, lossless ones read as steps from ``base``."""
        twin = copy.copy(self)
        twin.base = base
        return twin

    def select(self, names: Iterable[str]) -> Self:
        """The same deltas without those of other names; no value is read."""
        twin = copy.copy(self)
        twin.headers = {name: self.headers[name] for name in names}
        twin.tensors = {name: self.tensors[name] for name in twin.headers}
        return twin

    def _rows(self, name: str, first: int, last: int) -> tuple[Encoded, slice | None]:
        """Parts that some matrix rows can be decoded from, and which rows of them those are (None: all)."""
        raise NotImplementedError

    def _decode(self, name: str, start: int, stop: int) -> Tensor:
        shape = self.tensors[name].shape
        columns = max(shape[-1], 1)
        first, last = start // columns, -(-stop // columns)
        if first >= last:
            return torch.empty(0)
        encoded, rows = self._rows(name, first, last)
        base = self._base_rows(name, first, last)
        base = None if base is None else base.to(next(iter(encoded.parts.values())).device)
        try:
            decoded = formats.decode(encoded, base, rows)
        except AlignvecError as error:
            raise AlignvecError(f"delta {name}: {error}") from None
        values = decoded.reshape(-1)[start - first * columns : stop - first * columns].cpu()
        require_finite(name, values)
        return values

    def aligned(self, name: str, start: int, stop: int) -> Tensor:
        """Values of the aligned tensor that a lossless delta leads to, bit for bit."""
        columns = self.tensors[name].shape[-1]
        first, last = start // columns, -(-stop // columns)
        encoded, rows = self._rows(name, first, last)
        base = self._base_rows(name, first, last)
        assert base is not None
        aligned: Tensor = formats.FORMATS["lossless"].apply(encoded, base, rows)
        return aligned.reshape(-1)[start - first * columns : stop - first * columns].cpu()

    def _base_rows(self, name: str, first: int, last: int) -> Tensor | None:
        if (header := self.headers[name]).name != "lossless":
            return None
        if self.base is None:
            raise AlignvecError(
                f"delta {name} is stored lossless, as steps from the base's values: give the base, "
                "vector.with_base(base) or --base"
            )
        columns = header.shape[-1]
        base = self.base.read(name, first * columns, last * columns)
        return base.view(last - first, columns).to(getattr(torch, str(header.options["dtype"])))


class InMemory(_Leaf):
    """Deltas held as tensors, dense or encoded, on any device."""

    def __init__(self, values: Mapping[str, Tensor | Encoded], base: BaseValues | None = None) -> None:
        self.base = base
        self.dense: dict[str, Tensor] = {}
        self.others: dict[str, Encoded] = {}
        headers: dict[str, Encoded] = {}
        for name, value in values.items():
            if isinstance(value, Encoded):
                checked(name, value)
                if value.name != "dense":
                    self.others[name] = value
                    headers[name] = Encoded(value.name, value.shape, value.options, {})
                    continue
                value = value.parts[""]
            _require_floating(name, value.dtype)
            flat = value.detach().reshape(-1)
            for start in range(0, flat.numel(), STEP):
                require_finite(name, flat[start : start + STEP])
            self.dense[name] = value
            headers[name] = dense_header(tuple(value.shape))
        dtypes = {name: self.dense[name].dtype if name in self.dense else torch.float32 for name in headers}
        self._describe(headers, dtypes)

    def select(self, names: Iterable[str]) -> Self:
        twin = super().select(names)
        twin.dense = {name: value for name, value in self.dense.items() if name in twin.headers}
        twin.others = {name: value for name, value in self.others.items() if name in twin.headers}
        return twin

    def read(self, name: str, start: int, stop: int) -> Tensor:
        if name in self.dense:
            return self.dense[name].detach().reshape(-1)[start:stop].cpu()
        return self._decode(name, start, stop)

    def encoded(self, name: str) -> Encoded:
        return self.others[name] if name in self.others else as_dense(self.dense[name].detach())

    def layout(self, name: str) -> dict[str, TensorInfo]:
        return {part: TensorInfo(value.dtype, tuple(value.shape)) for part, value in self.encoded(name).parts.items()}

    def _rows(self, name: str, first: int, last: int) -> tuple[Encoded, slice | None]:
        return self.others[name], slice(first, last)


class Stored(_Leaf):
    """Deltas that stay in their files: everything but the values is checked now, values when they are read."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        headers: Mapping[str, Encoded] | None = None,
        base: BaseValues | None = None,
        checksums: Checksums | None = None,
    ) -> None:
        """`headers`: which format each tensor has; without, all are dense. `checksums`: what reading compares with."""
        if headers is None:
            headers = {name: dense_header(info.shape) for name, info in checkpoint.tensors.items()}
        self.base = base
        self.checkpoint: Checkpoint | VerifiedCheckpoint = checkpoint
        self._parts = {name: self._find(name, header) for name, header in headers.items()}
        claimed = [info for parts in self._parts.values() for info in parts]
        if unknown := sorted(checkpoint.tensors.keys() - {key(name, p) for name in headers for p in self._parts[name]}):
            raise AlignvecError(f"the safetensors files hold {unknown[0]}, which no delta has: the vector is corrupted")
        if len(claimed) != len(checkpoint.tensors):
            raise AlignvecError("two deltas share a part: the vector is corrupted")
        dtypes = {
            name: self._parts[name][""].dtype if header.name == "dense" else torch.float32
            for name, header in headers.items()
        }
        self._describe(dict(headers), dtypes)
        if checksums is not None:
            self.checkpoint = VerifiedCheckpoint(checkpoint, dict(self._expected(checksums)))
        self._last: tuple[str, Encoded] | None = None  # formats that need all of a tensor are read once, not per piece

    def _expected(self, checksums: Checksums) -> Iterator[tuple[str, tuple[int, str]]]:
        """What VerifiedCheckpoint takes: the seed and the digits of every stored part."""
        for name, parts in self._parts.items():
            if name not in checksums or checksums[name].keys() != parts.keys():
                raise AlignvecError(f"delta {name} does not have a checksum for each of its parts: it is malformed")
            for part, info in parts.items():
                seed = meaning(name, self.headers[name], part, info.dtype, info.shape)
                yield key(name, part), (seed, checksums[name][part])

    def _find(self, name: str, header: Encoded) -> dict[str, TensorInfo]:
        if header.name != "dense" and (len(header.shape) < 2 or not math.prod(header.shape)):
            raise AlignvecError(f"delta {name} has shape {list(header.shape)}, which is stored dense alone")
        try:
            expected = formats.layout(header.name, header.shape, header.options)
        except AlignvecError as error:
            raise AlignvecError(f"delta {name}: {error}") from None
        found = {}
        for part, (dtypes, shape) in expected.items():
            info = self.checkpoint.tensors.get(key(name, part))
            if info is None:
                raise AlignvecError(
                    f"{key(name, part)}, which the {header.name} delta {name} needs, is missing in the safetensors "
                    "files: the vector is incomplete or corrupted"
                )
            if header.name == "dense":
                _require_floating(name, info.dtype)
            fits = len(info.shape) == len(shape) and all(
                want in (None, got) for want, got in zip(shape, info.shape, strict=True)
            )
            if not fits or info.dtype not in (dtypes if isinstance(dtypes, tuple) else (dtypes,)):
                raise AlignvecError(
                    f"{key(name, part)} is {info.dtype} {list(info.shape)} in the safetensors files, which does not "
                    f"fit the {header.name} delta {name} of shape {list(header.shape)}: the vector is corrupted"
                )
            found[part] = info
        return found

    def read(self, name: str, start: int, stop: int) -> Tensor:
        if self.headers[name].name != "dense":
            return self._decode(name, start, stop)
        values = self.checkpoint.read(name, start, stop)
        require_finite(name, values)
        return values

    def encoded(self, name: str) -> Encoded:
        if (last := self._last) is not None and last[0] == name:
            return last[1]
        header = self.headers[name]
        parts = {part: self.checkpoint.tensor(key(name, part)) for part in self._parts[name]}
        encoded = checked(name, Encoded(header.name, header.shape, header.options, parts))
        if header.name not in BY_ROWS and header.name != "dense":
            self._last = (name, encoded)
        return encoded

    def part(self, name: str, part: str) -> Tensor:
        """One part of a delta as it is stored, its values not checked but for their checksums."""
        return self.checkpoint.tensor(key(name, part))

    def layout(self, name: str) -> dict[str, TensorInfo]:
        return dict(self._parts[name])

    @property
    def verified(self) -> bool:
        """Whether what is read is compared with checksums."""
        return isinstance(self.checkpoint, VerifiedCheckpoint)

    def _rows(self, name: str, first: int, last: int) -> tuple[Encoded, slice | None]:
        header = self.headers[name]
        if header.name not in BY_ROWS:
            return self.encoded(name), slice(first, last)
        columns, parts = header.shape[-1], {}
        for part, info in self._parts[name].items():
            if part in BY_ROWS[header.name]:
                width = math.prod(info.shape[1:])
                values = self.checkpoint.read(key(name, part), first * width, last * width)
                parts[part] = values.view(last - first, *info.shape[1:])
            elif header.name != "lossless":
                parts[part] = self.checkpoint.tensor(key(name, part))
        if header.name == "lossless":
            parts |= self._side_table(name, first, last)
        return checked(name, Encoded(header.name, (last - first, columns), header.options, parts)), None

    def _side_table(self, name: str, first: int, last: int) -> dict[str, Tensor]:
        """The large steps of some rows. The ends of the tensor take what lies beyond them, too, and a place that the
        table does not have stays as it is, so that the check refuses both."""
        start = self.checkpoint.read(key(name, "side_start"), first, last + 1)
        size = min(self._parts[name][part].numel for part in ("side_columns", "side_bits"))
        low = min(max(int(start[0]), 0), size) if first else 0
        high = min(max(int(start[-1]), low), size) if last + 1 < self._parts[name]["side_start"].numel else size
        side = {part: self.checkpoint.read(key(name, part), low, high) for part in ("side_columns", "side_bits")}
        return {"side_start": start - low, **side}


def key(name: str, part: str) -> str:
    """What a part is called in safetensors files."""
    return f"{name}/{part}" if part else name


def as_dense(values: Tensor) -> Encoded:
    return Encoded("dense", tuple(values.shape), {}, {"": values})


def dense_header(shape: tuple[int, ...]) -> Encoded:
    return Encoded("dense", shape, {}, {})


def checked(name: str, encoded: Encoded) -> Encoded:
    """`encoded` itself, or an AlignvecError that names the delta whose parts are damaged."""
    try:
        formats.check(encoded)
    except AlignvecError as error:
        raise AlignvecError(f"delta {name}: {error}") from None
    return encoded


def require_finite(name: str, values: Tensor) -> None:
    """AlignvecError when the delta called ``name`` holds NaN or infinity."""
    if values.numel() and not all(math.isfinite(float(end)) for end in values.aminmax()):
        raise AlignvecError(f"delta {name} holds NaN or infinity: is a checkpoint damaged, or did training diverge?")


def _require_floating(name: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise AlignvecError(f"delta {name} is {dtype}, but a delta must be a floating tensor")
    if dtype.itemsize < 2:
        raise AlignvecError(
            f"delta {name} is {dtype}, whose values nothing adds up; convert it to bfloat16, which holds them all"
        )
