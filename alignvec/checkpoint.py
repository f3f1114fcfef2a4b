"""Reading safetensors checkpoints: validated up front, then plain positioned reads of any part of any tensor.

Nothing is memory-mapped: mapped pages count as resident memory, and a streamed pass must stay small.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from stat import S_ISDIR
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.folders import steady
from alignvec.hidden import recover
from alignvec.printable import shown
from alignvec.untrusted import (
    brief,
    mode_of,
    opened,
    parse_json,
    present,
    read_json,
    require_memory,
    require_name,
    tensor_shape,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MOST_HEADER = 100_000_000  # bytes of a safetensors header, as the safetensors library has it


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: dtype, shape, and for a stored one its file and the byte at which its values begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path | None = None
    offset: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Checkpoint:
    """An opened safetensors checkpoint: ``tensors`` (name to TensorInfo, in file order) and ``config`` (config.json).

    Holds no open file, so it can be copied and pickled; a file that changed since it was opened is refused when read.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], config: dict[str, Any]) -> None:
        self.path, self.tensors, self.config = path, tensors, config
        self._stamps = {}
        for file in {info.file for info in tensors.values() if info.file is not None}:
            with opened(file) as descriptor:
                self._stamps[file] = _stamp(os.fstat(descriptor))

    @classmethod
    def open(cls, path: str | Path, *, stem: str = "model") -> Checkpoint:
        """Open a folder (``{stem}.safetensors``, or shards with ``{stem}.safetensors.index.json``) or one file.

        Headers, offsets, sizes and the index are checked now; values are read later. Raises AlignvecError.
        """
        path = Path(path)
        recover(path)
        if (mode := mode_of(path)) is None:
            raise AlignvecError(f"{path} does not exist: give a checkpoint folder or a .safetensors file")
        if not S_ISDIR(mode):
            if path.suffix != ".safetensors":
                raise AlignvecError(f"{path} is not a .safetensors file: {_advice(path)}")
            return cls(path, _header(path), _config(path.parent))
        single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
        whole, sharded = present(single), present(index)
        if whole and sharded:
            raise AlignvecError(f"{path} holds both {single.name} and {index.name}: remove the one that is out of date")
        with steady(path):
            if whole:
                return cls(path, _header(single), _config(path))
            if sharded:
                return cls(path, _sharded(index), _config(path))
        raise AlignvecError(f"{path} holds neither {single.name} nor {index.name}: {_advice(path)}")

    @property
    def files(self) -> list[Path]:
        """The shard files, sorted by name."""
        return sorted(self._stamps)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """Values ``start`` to ``stop`` of the flattened tensor, as a flat tensor [stop - start].

        ``out``: a uint8 buffer on the CPU to read into (its beginning is returned, viewed in the tensor's dtype).
        """
        info = self.tensors[name]
        assert info.file is not None
        size, itemsize = (info.numel if stop is None else stop) - start, info.dtype.itemsize
        buffer = _buffer(name, size * itemsize) if out is None else out[: size * itemsize]
        if size:
            _read_into(info.file, self._stamps[info.file], info.offset + start * itemsize, buffer)
        return buffer.view(info.dtype)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, in its stored dtype and shape."""
        return self.read(name).view(self.tensors[name].shape)


def _buffer(name: str, nbytes: int) -> Tensor:
    require_memory(nbytes, f"the values of {name}")
    try:
        return torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError:
        raise AlignvecError(
            f"tensor {name}: there is not enough memory for {nbytes} bytes; read it in pieces"
        ) from None


def _read_into(file: Path, stamp: tuple[int, ...], offset: int, buffer: Tensor) -> None:
    view = memoryview(buffer.numpy().data)
    with opened(file) as descriptor:
        if _stamp(os.fstat(descriptor)) != stamp:
            raise AlignvecError(f"{file} changed after it was opened: open it again")
        while view:
            count = os.preadv(descriptor, [view], offset)
            if not count:
                raise AlignvecError(f"{file} ends before its last tensor: the file is truncated")
            view, offset = view[count:], offset + count


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of one file, in the order of its bytes; the safetensors library refuses a malformed file."""
    with opened(file) as descriptor:
        size = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if not 0 < size <= min(MOST_HEADER, os.fstat(descriptor).st_size - 8):
            raise AlignvecError(f"{file} is truncated, corrupted or no safetensors file (its header has {size} bytes)")
        raw = os.pread(descriptor, size, 8)
    try:
        with safe_open(str(file), framework="numpy") as checked:  # torch would map it to be written
            names = set(checked.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise AlignvecError(f"{file} is truncated, corrupted or no safetensors file ({brief(error)})") from None
    except MemoryError:  # the library maps the file while it looks at the header
        raise AlignvecError(f"{file} is too large for the memory that this process may use") from None
    header = parse_json(raw, file, exact=True)
    header.pop("__metadata__", None)
    if header.keys() != names:
        raise AlignvecError(f"{file} changed while it was opened: open it again")
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        require_name(name, file)
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise AlignvecError(
                f"{file}: tensor {name} is stored as {entry['dtype']}, which is not read: use an unquantised checkpoint"
            )
        try:
            shape = tensor_shape(entry["shape"])
        except ValueError as error:
            raise AlignvecError(f"{file}: tensor {name} cannot be read: {error}") from None
        info = TensorInfo(dtype, shape, file, 8 + size + entry["data_offsets"][0])
        if entry["data_offsets"][1] - entry["data_offsets"][0] != info.nbytes:
            raise AlignvecError(f"{file}: the offsets of tensor {name} do not fit its shape: the file is corrupted")
        tensors[name] = info
    return tensors


def _sharded(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index, exact=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise AlignvecError(f"{index} has no weight_map of tensor names to file names")
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        shards.setdefault(file, set()).add(name)
    for file, named in sorted(shards.items()):
        if file != Path(file).name or "\\" in file or not file.endswith(".safetensors"):
            raise AlignvecError(f"{index} names the file {shown(file)!r}: only .safetensors files beside it are read")
        shard = index.parent / file
        if not present(shard):
            raise AlignvecError(f"{index} names the shard {shown(file)}, which is missing")
        stored = _header(shard)
        for name in sorted(named - stored.keys()):
            raise AlignvecError(
                f"{index} says that {shown(file)} holds {shown(name)}, but it does not: was a shard renamed?"
            )
        for name in sorted(stored.keys() - named):
            where = f"places it in {shown(weight_map[name])}" if name in weight_map else "does not name it"
            raise AlignvecError(f"{shard} holds {name}, but the index {where}: was a shard renamed?")
        tensors.update(stored)
    return tensors


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file) if present(file) else {}


def _advice(path: Path) -> str:
    pickled_alone = (path / "adapter_model.bin").is_file() and not (path / "adapter_model.safetensors").is_file()
    if (path / "adapter_config.json").is_file() and not pickled_alone:
        return "it is a PEFT adapter, which from_peft reads"
    pickled = path.suffix in (pattern[1:] for pattern in PICKLES) or (
        path.is_dir() and any(next(path.glob(pattern), None) for pattern in PICKLES)
    )
    if pickled:
        return "pickled checkpoints are not read, convert to safetensors (save_pretrained does)"
    return "give a safetensors checkpoint"
