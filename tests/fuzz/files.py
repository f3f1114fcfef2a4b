"""Safetensors files and JSON as bytes that a mutation takes apart and puts together, with no check of what they say."""

from __future__ import annotations

import json
import math
from typing import Any

SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
MOST = 1 << 20  # bytes of a tensor that a mutation makes


def parsed(data: bytes, suffix: str) -> Any:
    """The JSON of a file; of a safetensors file the header's."""
    return json.loads(data[8 : data_start(data)] if suffix == ".safetensors" else data)


def header_of(data: bytes) -> dict[str, Any]:
    found = parsed(data, ".safetensors")
    if not isinstance(found, dict):
        raise ValueError("the header is no object")
    return found


def data_start(data: bytes) -> int:
    """Where the values of a safetensors file begin."""
    return 8 + int.from_bytes(data[:8], "little")


def value_bytes(data: bytes, entry: dict[str, Any]) -> bytes:
    """The bytes of one tensor."""
    begin, end = entry["data_offsets"]
    return data[data_start(data) :][begin:end]


def with_header(text: bytes, data: bytes) -> bytes:
    """A safetensors file with another header of the right length, and the values that it had."""
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[data_start(data) :]


def with_tensor(data: bytes, name: str, dtype: str, shape: list[int], filled: bytes = b"\0") -> bytes:
    """A sound safetensors file in which a tensor, new or not, has this dtype and shape.

    Its values are those that it had, repeated or cut to fit, or else ``filled``. ValueError for more than MOST bytes.
    """
    held = _held(data)
    size = math.prod(shape) * SIZES.get(dtype, 1)
    if not 0 <= size <= MOST:
        raise ValueError(f"{size} bytes")
    values = held.get(name, ({}, b""))[1] or filled
    held[name] = ({"dtype": dtype, "shape": shape}, (values * (size // len(values) + 1))[:size])
    return _assembled(data, held)


def without_tensors(data: bytes, name: str) -> bytes:
    """A sound safetensors file without a delta's parts."""
    held = _held(data)
    return _assembled(data, {key: value for key, value in held.items() if key.partition("/")[0] != name})


def _held(data: bytes) -> dict[str, tuple[dict[str, Any], bytes]]:
    header = header_of(data)
    return {key: (entry, value_bytes(data, entry)) for key, entry in header.items() if key != "__metadata__"}


def _assembled(data: bytes, held: dict[str, tuple[dict[str, Any], bytes]]) -> bytes:
    """A file of these tensors, with the metadata of the one before."""
    entries: dict[str, Any] = {key: value for key, value in header_of(data).items() if key == "__metadata__"}
    at = 0
    for key, (entry, piece) in held.items():
        entries[key] = {**entry, "data_offsets": [at, at + len(piece)]}
        at += len(piece)
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(piece for _, piece in held.values())


def with_value(data: bytes, name: str, index: int, value: int) -> bytes:
    """The file with another integer in one place of a tensor's bytes; it wraps to the size of the tensor's values."""
    entry = header_of(data)[name]
    size = SIZES.get(entry["dtype"], 1)
    begin = data_start(data) + entry["data_offsets"][0] + index * size
    if not data_start(data) <= begin <= len(data) - size:
        raise ValueError(f"{index} is out of the file")
    return data[:begin] + (value % (1 << 8 * size)).to_bytes(size, "little") + data[begin + size :]
