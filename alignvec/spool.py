"""Encoded tensors into a vector's safetensors files, of sizes that nobody knows beforehand."""

from __future__ import annotations

from pathlib import Path

import torch

from alignvec.checkpoint import Checkpoint, TensorInfo
from alignvec.deltas import key
from alignvec.description import STEM
from alignvec.formats import Encoded
from alignvec.integrity import checksums_of
from alignvec.writer import ShardWriter, parse_size

STEP = 1 << 22  # bytes copied at a time


class Spool:
    """Takes encoded tensors in any order; ``close`` writes the files.

    A safetensors file has no holes, so parts of wider dtypes have to come first in it or nothing would be aligned.
    Parts therefore wait in one temporary file, in the order in which they were made.
    """

    def __init__(self, folder: Path, max_shard_size: int | str) -> None:
        self.folder, self.limit = folder, parse_size(max_shard_size)
        self._path = folder / f"{STEM}.parts"
        self._file = self._path.open("wb")
        self._parts: dict[str, TensorInfo] = {}
        self.checksums: dict[str, dict[str, str]] = {}  # of what was given, by tensor and part

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, name: str, encoded: Encoded) -> None:
        parts = {part: values.detach().cpu().contiguous() for part, values in encoded.parts.items()}
        self.checksums[name] = checksums_of(name, Encoded(encoded.name, encoded.shape, encoded.options, parts))
        for part, values in parts.items():
            offset = self._file.tell()
            self._file.write(memoryview(values.view(-1).view(torch.uint8).numpy().data) if values.numel() else b"")
            self._parts[key(name, part)] = TensorInfo(values.dtype, tuple(values.shape), self._path, offset)

    def close(self) -> None:
        self._file.close()
        parts = dict(sorted(self._parts.items(), key=lambda item: -item[1].dtype.itemsize))
        spooled = Checkpoint(self._path, parts, {})
        with ShardWriter(self.folder, STEM, parts, self.limit) as writer:
            for name, info in parts.items():
                writer.begin(name, info.dtype, info.shape)
                step = STEP // info.dtype.itemsize
                for start in range(0, info.numel, step):
                    writer.write(spooled.read(name, start, min(start + step, info.numel)))
                writer.end()
            writer.close()
        self._path.unlink()
