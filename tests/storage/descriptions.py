"""Vectors whose files are changed on purpose: without checksums, as early versions wrote them, or with their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignvec.integrity import sealed

Change = Callable[[dict[str, Any]], object]


def change_description(folder: Path, change: Change = lambda data: None) -> Path:
    """Edit what a vector's description says, and take its checksums out: what is wrong then has to be found without."""
    file = folder / "alignment_vector.json"
    data = json.loads(file.read_text())
    change(data)
    data.pop("checksum", None)
    for entry in data["tensors"].values() if isinstance(data.get("tensors"), dict) else ():
        if isinstance(entry, dict):
            entry.pop("checksum", None)
    file.write_text(json.dumps(data))
    return folder


def change_and_seal(folder: Path, change: Change) -> Path:
    """Edit what a vector's description says, checksums of tensors included, and give it the checksum of that."""
    file = folder / "alignment_vector.json"
    data = json.loads(file.read_text())
    data.pop("checksum")
    change(data)
    file.write_text(json.dumps(sealed(data)))
    return folder
