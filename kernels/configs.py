"""Tuned tables: what one GPU can do, how fast kernels ran on it and with which tiles.

A table is a JSON file. `alignvec/tuned/` has those that come with alignvec, `alignvec tune` writes one to the user's
cache, and `ALIGNVEC_TUNED` names one that goes before both. They are read when a device is first asked for.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from alignvec import errors
from alignvec.errors import AlignvecError

ROW = 1 << 30  # operands.ROW: a group as long as any row
LARGEST = 16 << 20  # bytes of a table: hundreds of times what all formats of a model take
EXECUTIONS = ("split", "combine", "materialise")
PRECISIONS = ("exact", "merged")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Config:
    """Tile shape and resources of one launch; `split_k` programs share the input features of a tile."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1


@dataclass(frozen=True)
class Device:
    """What a device can do, in plain numbers.

    read_bandwidth: bytes per second of a long read. matrix_16, matrix_32: FLOP per second of a large product with
    16-bit and with float32 inputs, by the vendor's library. vector_32: FLOP per second of float32 arithmetic outside
    matrix units. launch: seconds that a kernel takes to begin. vendor_bandwidth: the share of read_bandwidth that the
    vendor's product reaches with few tokens. kernel_matrix: the share of matrix_16 and matrix_32 that alignvec's
    kernels reach, where no entry of the table says better. source: where the figures come from.
    """

    name: str
    read_bandwidth: float
    matrix_16: float
    matrix_32: float
    vector_32: float
    launch: float
    vendor_bandwidth: float
    kernel_matrix: float
    multiprocessors: int
    source: str


@dataclass(frozen=True)
class Entry:
    """One measurement: the seconds of one layer's linear operator, and the tiles that it was fastest with.

    vectors: `signature` of the operands. vector_bytes: what a kernel reads of them.
    """

    execution: str
    precision: str
    vectors: str
    dtype: str
    tokens: int
    out_features: int
    in_features: int
    vector_bytes: int
    seconds: float
    config: Config | None = None

    @property
    def key(self) -> tuple[str | int, ...]:
        """What was measured; a table has one entry of each."""
        shape = (self.tokens, self.out_features, self.in_features)
        return (self.execution, self.precision, self.vectors, self.dtype, *shape)


@dataclass(frozen=True)
class Table:
    """device, entries, and `about` (versions, date and the like); `matches`: parts of the device names it is for.

    origin: "ALIGNVEC_TUNED", "the user's cache" or "alignvec's own".
    """

    device: Device
    matches: tuple[str, ...]
    entries: tuple[Entry, ...]
    about: dict[str, str]
    path: Path | None = None
    origin: str = ""

    def serves(self, device_name: str) -> bool:
        """Slices of a GPU (MIG) carry its name but not its figures."""
        return device_name in self.matches or any(
            part in device_name and "MIG" not in device_name for part in self.matches
        )


def bucket(tokens: int) -> int:
    """Numbers of tokens are planned and tuned in powers of two: the one that `tokens` goes up to."""
    return 1 << max(tokens - 1, 0).bit_length()


def describe(spec: str) -> str:
    """The format that an operand's spec comes from, as a user writes it: `int4:group=128`."""
    kind, bits, _, group = spec.split(":")
    if kind == "lossless":
        return f"lossless:bits={bits}"
    if kind != "codes":
        return kind
    name = "sign" if bits == "1" else f"int{bits}"
    return f"{name}:group={'row' if int(group) == ROW else group}"


@functools.lru_cache(4096)
def signature(specs: tuple[str, ...]) -> str:
    """The formats of a layer's vectors in any order: `2*dense+1*sign:group=row`."""
    return "+".join(f"{count}*{name}" for name, count in sorted(Counter(map(describe, specs)).items()))


def lookup(
    device_name: str,
    execution: str,
    specs: Sequence[str],
    dtype: str,
    tokens: int,
    out_features: int,
    in_features: int,
    precision: str = "exact",
) -> Config | None:
    """The tuned tiles for a call, or None where the table has none for its shape, formats and weights' dtype.

    dtype: "bfloat16", "float16" or "float32", of the weight. The tokens tuned for may be off by up to a factor of 4,
    in buckets. Cached: microseconds.
    """
    shape = (bucket(tokens), out_features, in_features)
    return _lookup(device_name, execution, tuple(specs), dtype, *shape, "exact" if execution == "split" else precision)


@functools.lru_cache(4096)
def _lookup(
    device_name: str,
    execution: str,
    specs: tuple[str, ...],
    dtype: str,
    tokens: int,
    out_features: int,
    in_features: int,
    precision: str,
) -> Config | None:
    tuned = table(device_name)
    wanted = (execution, precision, signature(specs), dtype, out_features, in_features)
    near: list[tuple[float, Config]] = []
    for e in tuned.entries if tuned else ():
        if (e.execution, e.precision, e.vectors, e.dtype, e.out_features, e.in_features) == wanted and e.config:
            near.append((abs(math.log2(e.tokens / tokens)), e.config))
    distance, config = min(near, key=lambda pair: pair[0], default=(math.inf, None))
    return config if distance <= 2 else None


def user_folder() -> Path:
    """Where `alignvec tune` leaves tables."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignvec" / "tuned"


def file_name(device_name: str) -> str:
    """`NVIDIA H200` -> `nvidia-h200.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


@functools.lru_cache(64)
def table(device_name: str) -> Table | None:
    """The table that serves a device: that of `ALIGNVEC_TUNED`, of the user's cache, or alignvec's own.

    Raises:
        AlignvecError: a table that cannot be read or is not one.
    """
    chosen = os.environ.get("ALIGNVEC_TUNED")
    if chosen:
        tuned = read(Path(chosen))
        if tuned.serves(device_name):
            return replace(tuned, origin="ALIGNVEC_TUNED")
    own = user_folder() / file_name(device_name)
    if own.is_file():
        return replace(read(own), origin="the user's cache")
    return next((tuned for tuned in packaged() if tuned.serves(device_name)), None)


@functools.cache
def packaged() -> tuple[Table, ...]:
    """The tables that come with alignvec."""
    folder = Path(errors.__file__).parent / "tuned"
    return tuple(replace(read(path), origin="alignvec's own") for path in sorted(folder.glob("*.json")))


def forget() -> None:
    """Read tables anew when they are next asked for."""
    for cached in (_lookup, table, packaged):
        cached.cache_clear()


def read(path: Path) -> Table:
    """The table in a file.

    Raises:
        AlignvecError: no such file, or not a table; the sentence names the file and what is wrong with it.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"is larger than {LARGEST >> 20} MiB")
        return parse(json.loads(path.read_text(encoding="utf-8")), path)
    except RecursionError:
        raise AlignvecError(f"{path} is no tuned table: it is nested too deep") from None
    except OSError as error:
        raise AlignvecError(f"cannot read the tuned table {path}: {error.strerror}") from None
    except ValueError as error:  # JSON's errors and those of Unicode are ValueErrors, too
        raise AlignvecError(f"{path} is no tuned table: {error}; write one with alignvec tune") from None


def parse(data: Any, path: Path | None = None) -> Table:
    """A table from JSON's objects. Raises ValueError, in a clause, for what no table holds."""
    data = _object("the table", data, ("device", "matches", "entries", "about"))
    numbers = _object("device", data["device"], tuple(f.name for f in fields(Device)))
    made: dict[str, Any] = {}
    for name, value in numbers.items():
        if name in ("name", "source"):
            made[name] = _text(f"device {name}", value)
        elif name == "multiprocessors":
            made[name] = _whole("device multiprocessors", value, 4096)
        else:
            share = name in ("vendor_bandwidth", "kernel_matrix")
            made[name] = _positive(f"device {name}", value, 1.0 if share else 1e18)
    matches = tuple(_text("matches", part) for part in _list("matches", data["matches"]))
    about = {str(k): _text(f"about {k}", v) for k, v in _object("about", data["about"], None).items()}
    entries = tuple(_entry(f"entry {i}", value) for i, value in enumerate(_list("entries", data["entries"])))
    if len({entry.key for entry in entries}) < len(entries):
        twice = next(key for key, count in Counter(entry.key for entry in entries).items() if count > 1)
        raise ValueError(f"two entries measure the same thing, {' '.join(map(str, twice))}")
    return Table(Device(**made), matches, entries, about, path)


def _entry(what: str, value: Any) -> Entry:
    value = _object(what, value, tuple(f.name for f in fields(Entry)))
    for name, allowed in (("execution", EXECUTIONS), ("precision", PRECISIONS), ("dtype", DTYPES)):
        if value[name] not in allowed:
            raise ValueError(f"{what} has {name} {value[name]!r:.40}, not one of {', '.join(allowed)}")
    vectors = _text(f"{what} vectors", value["vectors"])
    sizes = ("out_features", "in_features", "vector_bytes")
    out_features, in_features, vector_bytes = (_whole(f"{what} {n}", value[n], 1 << 40) for n in sizes)
    tokens = _whole(f"{what} tokens", value["tokens"], 1 << 24)
    if tokens != bucket(tokens):
        raise ValueError(f"{what} has {tokens} tokens, not a power of two")
    seconds = _positive(f"{what} seconds", value["seconds"], 3600.0)
    config = None if value["config"] is None else _config(f"{what} config", value["config"])
    choices = (value["execution"], value["precision"], vectors, value["dtype"], tokens)
    return Entry(*choices, out_features, in_features, vector_bytes, seconds, config)


def _config(what: str, value: Any) -> Config:
    limits = {"block_m": 512, "block_n": 512, "block_k": 1024, "num_warps": 32, "num_stages": 8, "split_k": 64}
    value = _object(what, value, tuple(limits))
    config = Config(**{name: _whole(f"{what} {name}", value[name], limit) for name, limit in limits.items()})
    for name in ("block_m", "block_n", "block_k", "num_warps"):
        if value[name] != bucket(value[name]):
            raise ValueError(f"{what} {name} is {value[name]}, not a power of two")
    return config


def _object(what: str, value: Any, names: tuple[str, ...] | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no object")
    if names is not None and set(value) != set(names):
        odd = sorted(set(names) - set(value)) or sorted(set(value) - set(names))
        raise ValueError(f"{what} {'lacks' if set(names) - set(value) else 'has an unknown'} {odd[0]!r:.40}")
    return value


def _list(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is no list")
    return value


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str) or not value or len(value) > 1000:
        raise ValueError(f"{what} is no text of up to 1000 characters")
    return value


def _whole(what: str, value: Any, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{what} is {value!r:.40}, not a whole number from 1 to {most}")
    return value


def _positive(what: str, value: Any, most: float) -> float:
    if type(value) not in (int, float) or not 0 < value <= most:
        raise ValueError(f"{what} is {value!r:.40}, not a number above 0 and up to {most:g}")
    return float(value)
