"""Checksums of what a vector's files hold: made of the bytes as they are written, compared as they are read.

Every part of a delta is hashed in blocks of 1 MiB. A block is compared in the first read that needs any of it, so that
nothing is read twice, a range of a large tensor takes no more than its own blocks, and threads hash side by side. What
the bytes mean seeds the hash: the tensor's name, shape, format and options, the part's name, dtype and shape. Tensors
that changed places, or a header that changed, are found like a bit that flipped.

``alignment_vector.json`` has a checksum of its own, of what it says and not of how that is laid out. All of them find
accidents, not forgeries: whoever can write the files can write their checksums.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from alignvec.checkpoint import Checkpoint
from alignvec.errors import AlignvecError
from alignvec.fingerprint import dtype_name
from alignvec.formats import Encoded

BLOCK = 1 << 20  # bytes hashed at a time; every dtype's size divides it
DIGITS = 16  # hexadecimal digits a block
KIND = "xxh3-64/1MiB:"  # before the description's checksum: how all of them are made
SEAL = "checksum"  # the key of the description's checksum, and of a tensor's in its entry
Checksums: TypeAlias = Mapping[str, Mapping[str, str]]  # of a vector: by tensor and part, DIGITS a block


def _hash(data: Any, seed: int = 0) -> int:
    import xxhash  # when the first vector is read or written: importing alignvec stays quick

    return xxhash.xxh3_64_intdigest(data, seed=seed)


def meaning(name: str, header: Encoded, part: str, dtype: torch.dtype, shape: Iterable[int]) -> int:
    """The seed that stands for what the bytes of one part of a delta mean."""
    said = [name, header.name, dict(header.options), list(header.shape), part, dtype_name(dtype), list(shape)]
    return _hash(json.dumps(said, sort_keys=True).encode())


def checksum_of(values: Tensor, seed: int) -> str:
    """The checksum of values on the CPU, in any shape, that begin where a block does: DIGITS for every block.

    Checksums of pieces that end where a block does follow one another in that of the whole.
    """
    if not values.numel():
        return ""
    view = memoryview(values.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return "".join(_digits(view[start : start + BLOCK], seed) for start in range(0, len(view), BLOCK))


def checksums_of(name: str, encoded: Encoded) -> dict[str, str]:
    """The checksum of every part of a delta; the parts are on the CPU."""
    return {
        part: checksum_of(values, meaning(name, encoded, part, values.dtype, values.shape))
        for part, values in encoded.parts.items()
    }


def _digits(block: Any, seed: int = 0) -> str:
    return f"{_hash(block, seed):0{DIGITS}x}"


class VerifiedCheckpoint:
    """A checkpoint whose values are compared with their checksums by the first read that needs them.

    Blocks that were found right are trusted from then on: a file that changes later is refused by the checkpoint. Any
    number of threads may read; two that need the same block at once may both compare it.
    """

    def __init__(self, checkpoint: Checkpoint, checksums: Mapping[str, tuple[int, str]]) -> None:
        """``checksums``: of every tensor of the checkpoint, its seed and digits.

        Raises AlignvecError for digits that are not as many as the tensor has blocks.
        """
        self.checkpoint, self.tensors, self._checksums = checkpoint, checkpoint.tensors, dict(checksums)
        for name, (_, digits) in self._checksums.items():
            info = checkpoint.tensors[name]
            if not isinstance(digits, str) or len(digits) != DIGITS * -(-info.nbytes // BLOCK):
                raise AlignvecError(f"the checksum of {name} does not fit its {info.nbytes} bytes in {info.file}")
        self._right = {name: bytearray(len(digits) // DIGITS) for name, (_, digits) in self._checksums.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Values ``start`` to ``stop`` of the flattened tensor, as a flat tensor [stop - start].

        Raises AlignvecError where a block that they lie in does not have its checksum.
        """
        info, right = self.tensors[name], self._right[name]
        stop = info.numel if stop is None else stop
        first, last = start * info.dtype.itemsize // BLOCK, -(-stop * info.dtype.itemsize // BLOCK)
        if 0 not in right[first:last]:
            return self.checkpoint.read(name, start, stop)
        step = BLOCK // info.dtype.itemsize
        low, high = first * step, min(last * step, info.numel)
        values = self.checkpoint.read(name, low, high)
        view = memoryview(values.view(torch.uint8).numpy().data)
        for block in range(first, last):
            if not right[block]:
                self._compare(name, block, view[(block - first) * BLOCK : (block + 1 - first) * BLOCK])
                right[block] = 1
        return values if (low, high) == (start, stop) else values[start - low : stop - low].clone()

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, in its stored dtype and shape."""
        return self.read(name).view(self.tensors[name].shape)

    def _compare(self, name: str, block: int, data: memoryview) -> None:
        seed, digits = self._checksums[name]
        if _digits(data, seed) != digits[block * DIGITS : (block + 1) * DIGITS]:
            raise AlignvecError(
                f"{name} in {self.tensors[name].file} is damaged: what is read is not what was written; copy or "
                "extract the vector again"
            )


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """A description with its checksum, as JSON gives it back: lists for tuples, text for all keys."""
    read = json.loads(json.dumps(data))
    return {**read, SEAL: _seal(read)}


def _seal(data: Mapping[str, Any]) -> str:
    """The checksum of a description, of all that it says but for the checksum itself."""
    said = {key: value for key, value in data.items() if key != SEAL}
    return KIND + _digits(json.dumps(said, sort_keys=True).encode())


def recorded(file: Path, data: Mapping[str, Any]) -> Checksums | None:
    """The checksums in the description that ``file`` holds; None where a version wrote it that knew of none.

    Raises AlignvecError where the description is not what was written, or not all of its tensors have one.
    """
    found, tensors = data.get(SEAL), data.get("tensors")
    entries = tensors if isinstance(tensors, dict) else {}
    checksums = {name: entry[SEAL] for name, entry in entries.items() if isinstance(entry, dict) and SEAL in entry}
    if found is None and not checksums:
        return None
    if isinstance(found, str) and not found.startswith(KIND):
        raise AlignvecError(
            f"{file} is damaged, or of a later version: its checksum is {found[:40]!r}, and this version knows "
            f"{KIND}... alone; copy or extract the vector again, update alignvec, or load it with verify=False"
        )
    try:
        expected = _seal(data)
    except (RecursionError, ValueError) as error:
        raise AlignvecError(f"{file} cannot be compared with its checksum ({error}): it is malformed") from None
    if found != expected:
        raise AlignvecError(
            f"{file} is damaged, or was edited: it does not have the checksum that it was written with; copy or "
            "extract the vector again, or, for an edit of your own, write it anew: "
            "alignvec.load(folder, verify=False).save(folder, overwrite=True)"
        )
    for name in entries:
        if not isinstance(checksums.get(name), dict):
            raise AlignvecError(f"{file}: tensor {name} has no checksum, though the description has: it is malformed")
    return checksums
