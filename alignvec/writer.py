"""Writing safetensors checkpoints as a stream."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterable
from decimal import Decimal
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from alignvec.checkpoint import DTYPES, TensorInfo
from alignvec.errors import AlignvecError
from alignvec.folders import write_json
from alignvec.printable import shown
from alignvec.untrusted import LONGEST_NAME

NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
RESERVED = "__metadata__"  # what is no tensor in a header
LONGEST_HEADER = 100_000_000  # bytes; the safetensors library reads none that is longer


def parse_size(size: int | str) -> int:
    """Bytes in ``5_000_000_000``, ``"5GB"`` or ``"4GiB"``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    count = 0 if match is None else int(Decimal(match[1]) * UNITS.get(match[2].upper(), 0))
    if count < 1:
        raise AlignvecError(f"max_shard_size {size!r} is no size: write 5000000000, '5GB' or '500MB'")
    return count


class ShardWriter:
    """Writes ``{stem}.safetensors``, or shards of at most ``max_shard_size`` bytes with an index, tensor by tensor.

    ``begin``, ``write`` (any number of times) and then ``end`` or ``roll_back`` for each tensor; ``close`` at the last.
    ``expected`` names every tensor that may come: room for the header that lists them is left at the front of each
    file, and what is not needed of it stays blank, as the format allows. Widest dtypes should come first: a tensor that
    would not be aligned to its dtype starts a new shard. A single tensor above ``max_shard_size`` gets its own shard.
    """

    def __init__(
        self, folder: Path, stem: str, expected: dict[str, TensorInfo], max_shard_size: int | str | None = None
    ) -> None:
        self.folder, self.stem = folder, stem
        self.limit = None if max_shard_size is None else parse_size(max_shard_size)
        require_names(expected)
        largest = 8 + sum(info.nbytes for info in expected.values())
        entries = {name: _entry(info.dtype, info.shape, largest, largest) for name, info in expected.items()}
        self._room = -(-len(_header(entries)) // 8) * 8
        if self._room > LONGEST_HEADER:
            raise AlignvecError(
                f"the names of {len(expected)} tensors fill {self._room} bytes, and a safetensors file has room for "
                f"{LONGEST_HEADER}: give them shorter names"
            )
        self._shards: list[tuple[Path, str | None, list[str]]] = []  # written file, its final name, its tensors
        self._file: FileIO | None = None
        self._entries: dict[str, dict[str, object]] = {}
        self._current: tuple[str, torch.dtype, tuple[int, ...]] | None = None
        self._start = self._position = 0
        self.total_size = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def written(self) -> list[str]:
        """The tensors written so far."""
        return [name for _, _, names in self._shards for name in names] + list(self._entries)

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        assert self._current is None, "end or roll back the tensor before"
        size = dtype.itemsize * torch.Size(shape).numel()
        full = self.limit is not None and self._position + size > self.limit
        if self._entries and (full or self._position % dtype.itemsize):
            self.finish_shard()
        if self._file is None:
            self._open()
        self._current, self._start = (name, dtype, shape), self._position

    def _open(self) -> None:
        self._file = (self.folder / f"{self.stem}.{len(self._shards)}.partial").open("wb", buffering=0)
        self._file.seek(8 + self._room)
        self._entries, self._position = {}, 0

    def write(self, values: Tensor) -> None:
        """The next values of the tensor, flat, on the CPU, already in its dtype."""
        assert self._file is not None
        view = memoryview(values.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._position += len(view)
        while view:
            view = view[self._file.write(view) :]

    def end(self) -> None:
        assert self._current is not None
        name, dtype, shape = self._current
        assert self._position - self._start == dtype.itemsize * torch.Size(shape).numel(), name
        self._entries[name] = _entry(dtype, shape, self._start, self._position)
        self.total_size += self._position - self._start
        self._current = None

    def roll_back(self) -> None:
        """Forget the tensor begun last, as if it had never come."""
        assert self._file is not None
        self._file.seek(8 + self._room + self._start)
        self._file.truncate()
        self._current, self._position = None, self._start

    def finish_shard(self, name: str | None = None) -> None:
        """End the shard being written; ``name``: its file name, instead of a numbered one."""
        if self._file is None:
            return
        if not self._entries and self._shards:  # its only tensor was rolled back
            self._file.close()
            os.unlink(self._file.name)
            self._file = None
            return
        header = _header(self._entries)
        assert len(header) <= self._room
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()
        self._shards.append((Path(self._file.name), name, list(self._entries)))
        self._file, self._entries, self._position = None, {}, 0

    def close(self) -> None:
        """End the last shard, give every shard its final name, and write the index if there are several."""
        if self._file is None and not self._shards:
            self._open()
        self.finish_shard()
        weight_map, count = {}, len(self._shards)
        for number, (file, name, tensors) in enumerate(self._shards, start=1):
            if name is None:
                name = f"{self.stem}-{number:05}-of-{count:05}" if count > 1 else self.stem
                name += ".safetensors"
            file.rename(self.folder / name)
            weight_map.update(dict.fromkeys(tensors, name))
        if set(weight_map.values()) - {f"{self.stem}.safetensors"}:
            index = {"metadata": {"total_size": self.total_size}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / f"{self.stem}.safetensors.index.json", index)


def require_names(names: Iterable[str]) -> None:
    """AlignvecError for a name that is not read back: the header's own, what is no Unicode text, and a long one."""
    for name in names:
        if len(name) > LONGEST_NAME:
            raise AlignvecError(
                f"a tensor cannot be stored as {shown(name)!r}, a name of {len(name)} characters, which may have "
                f"{LONGEST_NAME}: rename it"
            )
        if name == RESERVED:
            raise AlignvecError(f"a tensor cannot be stored as {name!r}, which safetensors files keep: rename it")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise AlignvecError(f"a tensor cannot be stored as {name!r}, which is no text: rename it") from None


def require_apart(name: str, taken: Container[str]) -> None:
    """AlignvecError where a part of a delta would have the name of another: ``w/scales`` beside the scales of ``w``."""
    if name in taken:
        raise AlignvecError(f"two deltas would be stored as {name!r}: rename one of them, or change its format")


def _entry(dtype: torch.dtype, shape: tuple[int, ...], start: int, stop: int) -> dict[str, object]:
    return {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}


def _header(entries: dict[str, dict[str, object]]) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
