"""What measured rates depend on besides the coefficients, as a short text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from alignvec.errors import AlignvecError
from alignvec.evaluate import Question

SAMPLE = 1 << 20  # bytes read at the beginning, the middle and the end of a file of weights


def landscape_key(
    base: str | Path, vectors: Mapping[str, str | Path], questions: Sequence[Question], **settings: str
) -> str:
    """A fingerprint of a base folder, vectors' folders, questions and settings (dtype, ...): 32 hex digits.

    Of safetensors files their size and three mebibytes are read, header included, of JSON files and templates all. It
    tells mix-ups apart, not forgeries. Raises AlignvecError for a folder without files to read.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, folder in (("", base), *vectors.items()):
        digest.update(f"\n{name}\n".encode())
        files = sorted(p for p in Path(folder).glob("*") if p.suffix in (".json", ".jinja", ".safetensors"))
        if not files:
            raise AlignvecError(f"{folder} is no folder with a model or a vector")
        for file in files:
            digest.update(f"{file.name} {_sampled(file)}\n".encode())
    for question in questions:
        digest.update(json.dumps(asdict(question), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:32]


def _sampled(path: Path) -> str:
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        if path.suffix != ".safetensors" or size <= 3 * SAMPLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        for start in (0, size // 2, size - SAMPLE):
            file.seek(start)
            digest.update(file.read(SAMPLE))
    return f"{size} {digest.hexdigest()}"
