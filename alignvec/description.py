"""``alignment_vector.json``: what the safetensors files beside it mean, and what encoding them lost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from alignvec import formats
from alignvec.errors import AlignvecError
from alignvec.fingerprint import BaseIdentity
from alignvec.folders import as_json, write_json
from alignvec.formats import Encoded, auto
from alignvec.integrity import SEAL, Checksums, recorded, sealed
from alignvec.printable import shown
from alignvec.untrusted import brief, read_json, require_name, tensor_shape

STEM = "alignment_vector"  # alignment_vector.safetensors (or its shards and index) and alignment_vector.json
SCHEMA = 2  # 1: dense deltas alone, "tensors" gives their shapes
LARGEST_NORM = 2.0**500  # its square, and the sum of many, is finite
MIXED = "mixed"  # the title of a vector whose tensors were not asked for as one format


@dataclass(frozen=True)
class Error:
    """What encoding a delta lost. ``relative``: Euclidean norm of the error over the delta's, 0 for exact.

    ``norm``: of the delta before it was encoded, None where nobody measured it.
    """

    relative: float
    norm: float | None = None

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio in dB; infinite for exact."""
        return math.inf if not self.relative else -20 * math.log10(self.relative)

    @classmethod
    def of(cls, squared_error: float, squared_norm: float, name: str) -> Error:
        """Of the delta called ``name``. Raises AlignvecError where one of the sums is not finite, or no file's."""
        if not squared_norm < LARGEST_NORM**2:
            raise AlignvecError(
                f"delta {name} is too large for what encoding loses to be measured: its norm is above "
                f"{LARGEST_NORM:.0e}; extract it dense, in its own dtype"
            )
        if not squared_error < LARGEST_NORM**2:
            raise AlignvecError(f"delta {name} overflows when it is read back from this format: choose another one")
        relative = math.sqrt(squared_error / squared_norm) if squared_norm else 0.0
        return cls(relative, math.sqrt(squared_norm))

    def to_json(self) -> dict[str, float | None]:
        return {"relative": self.relative, "snr": self.snr if self.relative else None, "norm": self.norm}

    @classmethod
    def from_json(cls, data: Any) -> Error:
        relative, norm = data["relative"], data.get("norm")
        for number in (relative, 0 if norm is None else norm):
            if type(number) not in (int, float) or not 0 <= number < LARGEST_NORM:
                raise ValueError(f"error {shown(data)}")
        if relative * (norm or 0) >= LARGEST_NORM:
            raise ValueError(f"error {shown(data)}")
        return cls(float(relative), None if norm is None else float(norm))


@dataclass(frozen=True)
class Description:
    """The file, read. ``headers``: format, options and shape by name, without parts. ``checksums``: of what is stored,
    None where there are none, or none were asked for."""

    headers: dict[str, Encoded]
    format: str
    base: BaseIdentity | None
    source: dict[str, Any]
    errors: dict[str, Error]
    checksums: Checksums | None = None


def describe(
    folder: Path,
    headers: Mapping[str, Encoded],
    base: BaseIdentity | None,
    format: str,
    source: Mapping[str, Any],
    errors: Mapping[str, Error],
    checksums: Checksums,
) -> None:
    """Write ``alignment_vector.json`` into ``folder``. ``checksums``: of every tensor, as it was written."""
    try:
        version = metadata.version("alignvec")
    except metadata.PackageNotFoundError:
        version = "unknown"
    tensors = {
        name: {"shape": list(header.shape), "format": header.name, "options": dict(header.options)}
        | ({"error": errors[name].to_json()} if name in errors else {})
        | {SEAL: dict(checksums[name])}
        for name, header in headers.items()
    }
    data = {
        "schema": SCHEMA,
        "alignvec": version,
        "format": format,
        "source": dict(source),
        "tensors": tensors,
        "base": None if base is None else base.to_json(),
    }
    as_json(f"{STEM}.json", data)  # refuses what cannot be sealed
    write_json(folder / f"{STEM}.json", sealed(data))


def read_description(file: Path, *, verify: bool = True) -> Description:
    """What ``describe`` wrote, or schema 1; AlignvecError for anything else. ``verify``: compare its checksum."""
    data = read_json(file, exact=True)
    schema = data.get("schema")
    if type(schema) is not int or schema not in (1, SCHEMA):
        raise AlignvecError(
            f"{file} has schema {shown(repr(schema))}, this version reads 1 and {SCHEMA}: update alignvec"
        )
    checksums = recorded(file, data) if verify else None
    for key, kind in (("format", str), ("source", dict), ("tensors", dict)):
        if not isinstance(data.get(key), kind):
            raise AlignvecError(f"{file}: {key!r} is missing or malformed")
    headers: dict[str, Encoded] = {}
    errors: dict[str, Error] = {}
    for name, entry in data["tensors"].items():
        require_name(name, file)
        try:
            if schema == 1:
                entry = {"shape": entry, "format": "dense", "options": {}}
            headers[name] = _header(entry)
            if entry.get("error") is not None:
                errors[name] = Error.from_json(entry["error"])
        except AlignvecError as error:
            raise AlignvecError(f"{file}: tensor {name}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {brief(error)}"
            raise AlignvecError(f"{file}: the entry of tensor {name} is malformed ({reason})") from None
    try:
        known_format(data["format"])
        base = None if data.get("base") is None else BaseIdentity.from_json(data["base"])
    except AlignvecError as error:
        raise AlignvecError(f"{file}: {error}") from None
    return Description(headers, data["format"], base, data["source"], errors, checksums)


def _header(entry: dict[str, Any]) -> Encoded:
    name, options = entry["format"], entry["options"]
    if not (type(name) is str and isinstance(options, dict)):
        raise TypeError("format or options")
    formats.require(name)
    return Encoded(name, tensor_shape(entry["shape"]), options, {})


def known_format(format: str) -> None:
    """AlignvecError unless a vector can have been asked for as this: a format, ``"auto:0.25"`` or ``"mixed"``."""
    if format != MIXED and auto.fraction(format) is None:
        formats.parse(format)


def title(headers: Iterable[Encoded]) -> str:
    """The format that all tensors have, those of one dimension aside; ``"mixed"`` where they differ."""
    found = {str(header.spec) for header in headers if len(header.shape) > 1}
    return found.pop() if len(found) == 1 else MIXED if found else "dense"
