"""Checksums of a vector whose files were changed: made anew, as whoever changed them on purpose would, or taken out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from alignvec.checkpoint import DTYPES
from alignvec.errors import AlignvecError
from alignvec.formats import Encoded
from alignvec.integrity import SEAL, checksum_of, meaning, sealed
from tests.fuzz.files import header_of, parsed, value_bytes
from tests.storage.descriptions import change_description

DESCRIPTION = "alignment_vector.json"
UNREADABLE = (AlignvecError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)


def seal(folder: Path) -> None:
    """Give the description and all tensors the checksums of what is there now. What cannot be read is left as it is."""
    file = folder / DESCRIPTION
    with contextlib.suppress(*UNREADABLE):
        data = parsed(_read(file), file.suffix)
        stored = dict(_stored(folder))
        if data["schema"] == 1:
            return  # which knows no checksums
        tensors = data["tensors"]
        for name, entry in tensors.items() if isinstance(tensors, dict) else ():
            with contextlib.suppress(*UNREADABLE):
                entry[SEAL] = _of_parts(name, entry, stored)
        data.pop(SEAL, None)
        text = json.dumps(sealed(data))
        # Numbers that Python reads and writes in other words (1e999, NaN) are refused before checksums are compared.
        file.write_text(text)


def unseal(folder: Path) -> None:
    """Take all checksums out, as if a version had written the vector that knew of none."""
    with contextlib.suppress(*UNREADABLE):
        _read(folder / DESCRIPTION)
        change_description(folder)


def _read(file: Path) -> bytes:
    if not file.is_file() or file.is_symlink():
        raise FileNotFoundError(file)
    return file.read_bytes()


def _stored(folder: Path) -> Iterator[tuple[str, tuple[str, list[int], bytes]]]:
    """Dtype, shape and bytes of every tensor in the folder's safetensors files."""
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(*UNREADABLE):
            data = _read(file)
            for name, entry in header_of(data).items():
                if name != "__metadata__":
                    with contextlib.suppress(*UNREADABLE):
                        yield name, (entry["dtype"], entry["shape"], value_bytes(data, entry))


def _of_parts(name: str, entry: dict[str, Any], stored: dict[str, tuple[str, list[int], bytes]]) -> dict[str, str]:
    header = Encoded(entry["format"], tuple(entry["shape"]), entry["options"], {})
    found = {}
    for key, (dtype, shape, values) in stored.items():
        if key == name or key.startswith(f"{name}/"):
            part = key[len(name) + 1 :]
            flat = torch.frombuffer(bytearray(values), dtype=torch.uint8) if values else torch.empty(0)
            found[part] = checksum_of(flat, meaning(name, header, part, DTYPES[dtype], shape))
    return found
