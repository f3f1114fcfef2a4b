"""Writing safetensors checkpoints as a stream, into a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from alignvec.checkpoint import DTYPES, TensorInfo
from alignvec.errors import AlignvecError

NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes in ``5_000_000_000``, ``"5GB"`` or ``"4GiB"``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in UNITS or (count := int(float(match[1]) * UNITS[match[2].upper()])) < 1:
        raise AlignvecError(f"max_shard_size {size!r} is no size: write 5000000000, '5GB' or '500MB'")
    return count


@contextlib.contextmanager
def output_folder(path: str | Path, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """A hidden folder beside ``path`` to write into; renamed to ``path`` at the end, removed on any failure.

    An existing ``path`` is refused unless it is an empty folder, or ``overwrite`` is set and it holds a checkpoint or a
    vector; so is one that holds any of ``inputs``. Raises AlignvecError before anything is written.
    """
    path = Path(os.path.abspath(path))
    occupied = path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None)
    if occupied and not overwrite:
        raise AlignvecError(f"{path} exists and is not an empty folder: choose another output, or set overwrite")
    if occupied and not (path.is_dir() and next(path.glob("*.safetensors"), None)):
        raise AlignvecError(f"{path} holds no safetensors file, so it will not be overwritten: choose another output")
    for source in inputs:
        if source.resolve().is_relative_to(path.resolve()):
            raise AlignvecError(f"{path} holds the input {source}: choose another output")
    parents = [parent for parent in path.parents if not parent.exists()]
    name = f".{path.name}.{uuid.uuid4().hex[:8]}"
    temporary, old = path.with_name(f"{name}.partial"), path.with_name(f"{name}.old")
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise AlignvecError(f"{path} cannot be written: {error.strerror or error}") from error
        yield temporary
        if occupied:
            path.rename(old)
        temporary.replace(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in parents:
                parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


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
        largest = 8 + sum(info.nbytes for info in expected.values())
        entries = {name: _entry(info.dtype, info.shape, largest, largest) for name, info in expected.items()}
        self._room = -(-len(_header(entries)) // 8) * 8
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


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to; it takes the place of ``path`` when the block ends well, else it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(file: Path, data: object) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _entry(dtype: torch.dtype, shape: tuple[int, ...], start: int, stop: int) -> dict[str, object]:
    return {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}


def _header(entries: dict[str, dict[str, object]]) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
