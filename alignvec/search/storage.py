"""Measured mixes as JSON lines: a header that says what they are, then one line a mix; appended to, never rewritten."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignvec.errors import AlignvecError
from alignvec.folders import told

Record = tuple[list[float], Tensor, float]  # coefficients in the order of the names, rates [domains, levels], seconds

FORMAT = "alignvec landscape 1"
RECORD = '{"mix": '  # what every line after the header begins with


@dataclass(frozen=True)
class Header:
    """What the rates in a file belong to; `key` is the caller's fingerprint of model, vectors and questions."""

    names: tuple[str, ...]
    domains: tuple[str, ...]
    levels: tuple[str, ...]
    key: str

    def line(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}) + "\n"


class Storage:
    """A file of measured mixes. `records` is what it held when it was opened.

    A line without an end is what a process left that was killed while it wrote: it is dropped. Anything else that is
    not as it was written is refused with an AlignvecError that names the line, and so is a file with another header.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self._header = path, header
        self.records: list[Record] = []
        self._whole = 0  # bytes of whole lines
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise AlignvecError(f"{path} cannot be read: {error.strerror or error}") from None
        *lines, torn = content.split(b"\n")
        if not lines:
            if not header.line().encode().startswith(torn):
                raise AlignvecError(f"{path} is no file of measured mixes: choose another one to store them in")
            return
        self._check_header(lines[0])
        self.records = [self._record(i, line) for i, line in enumerate(lines[1:], 2)]
        if not (torn.startswith(RECORD.encode()) or RECORD.encode().startswith(torn)):
            raise AlignvecError(f"{path}, line {len(lines) + 1}: no measured mix; remove the line to go on without it")
        self._whole = len(content) - len(torn)

    def append(self, records: Sequence[tuple[Sequence[int], list[list[float]], float]]) -> None:
        """Write mixes (coefficients in millionths, rates, seconds) to the end; they are on disk when this returns."""
        lines = []
        for key, rates, took in records:
            mix = [value / 1e6 for value in key]
            if not all(math.isfinite(value) for value in [*mix, took, *(share for row in rates for share in row)]):
                raise AlignvecError(f"the rates of the mix {mix} hold NaN or infinity: they are not stored")
            lines.append(f'{RECORD}{json.dumps(mix)}, "rates": {json.dumps(rates)}, "seconds": {took:.6g}}}\n')
        with told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("r+b" if self.path.exists() else "wb") as file:
                file.truncate(self._whole)
                file.seek(self._whole)
                file.write(("" if self._whole else self._header.line()).encode() + "".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
                self._whole = file.tell()

    def _check_header(self, line: bytes) -> None:
        try:
            found: Any = json.loads(line)
            if found["format"] != FORMAT:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise AlignvecError(
                f"{self.path} is no file of measured mixes: choose another one to store them in"
            ) from None
        for field, mine in asdict(self._header).items():
            theirs = found.get(field)
            if theirs != (list(mine) if isinstance(mine, tuple) else mine):
                what = "another model, other vectors or questions" if field == "key" else f"other {field}: {theirs}"
                raise AlignvecError(f"{self.path} holds rates of {what}; choose another file")

    def _record(self, number: int, line: bytes) -> Record:
        header = self._header
        try:
            entry = json.loads(line)
            mix, rates = entry["mix"], torch.tensor(entry["rates"], dtype=torch.float64)
            if len(mix) != len(header.names) or rates.shape != (len(header.domains), len(header.levels)):
                raise ValueError
            if not bool(((rates >= -1e-9) & (rates <= 1 + 1e-9)).all()):
                raise ValueError
            return [float(value) for value in mix], rates, float(entry["seconds"])
        except (ValueError, KeyError, TypeError):
            raise AlignvecError(f"{self.path}, line {number}: damaged; remove the line to go on without it") from None
