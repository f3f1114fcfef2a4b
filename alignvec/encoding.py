"""From deltas to a format, tensor by tensor: the tensor at hand is in memory, the others are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from alignvec import formats
from alignvec.deltas import BaseValues
from alignvec.description import Error, describe
from alignvec.encoder import Encoder
from alignvec.formats import Encoded, Spec, auto
from alignvec.formats.steps import Counted
from alignvec.progress import bytes_bar
from alignvec.sources import Source
from alignvec.spool import Spool
from alignvec.vector import AlignmentVector


def asked_for(format: str) -> str:
    """The format as it is kept with a vector, every option spelled out; AlignvecError for one that does not exist."""
    return format.strip() if auto.fraction(format) is not None else str(formats.parse(format))


def write_encoded(
    folder: Path,
    vector: AlignmentVector,
    format: str | None,
    kept: Mapping[str, torch.dtype],
    max_shard_size: int | str,
    *,
    base: BaseValues | None = None,
    aligned: Source | None = None,
    counted: Mapping[str, Counted] | None = None,
    progress: bool = False,
) -> None:
    """The vector in a format, as the files of a folder; see ``encode_all``."""
    headers, errors = {}, {}
    with Spool(folder, max_shard_size) as spool:
        for name, encoded, error in encode_all(
            vector, format, kept, base=base, aligned=aligned, counted=counted, progress=progress
        ):
            spool.write(name, encoded)
            headers[name] = Encoded(encoded.name, encoded.shape, encoded.options, {})
            if error is not None:
                errors[name] = error
        spool.close()
    asked = vector.format if format is None else format
    describe(folder, headers, vector.base, asked, vector.source, errors, spool.checksums)


def encoded_in_memory(
    vector: AlignmentVector,
    format: str | None,
    kept: Mapping[str, torch.dtype],
    *,
    base: BaseValues | None = None,
    aligned: Source | None = None,
    counted: Mapping[str, Counted] | None = None,
    progress: bool = False,
) -> AlignmentVector:
    """The vector in a format; see ``encode_all``."""
    deltas, errors = {}, {}
    for name, encoded, error in encode_all(
        vector, format, kept, base=base, aligned=aligned, counted=counted, progress=progress
    ):
        deltas[name] = encoded
        if error is not None:
            errors[name] = error
    made = AlignmentVector(deltas, vector.base, format=format, source=vector.source, errors=errors)
    base = vector.base_values if base is None else base
    return made.with_base(base.source, verify=False) if made.needs_base and base is not None else made


def encode_all(
    vector: AlignmentVector,
    format: str | None,
    kept: Mapping[str, torch.dtype],
    *,
    base: BaseValues | None = None,
    aligned: Source | None = None,
    counted: Mapping[str, Counted] | None = None,
    progress: bool = False,
) -> Iterator[tuple[str, Encoded, Error | None]]:
    """Every delta in the format (None: the one that it has), and what that lost.

    A delta that is in the format already is passed on as it is.

    ``kept``: the dtype of values that the format stores as they are (dense and sparse). ``base``: the base's values,
    which lossless needs; default: what the vector is bound to. ``aligned``: the aligned model, where there is one:
    lossless then keeps its bits. ``counted``: the steps between the two, by tensor, where someone has counted them
    already. Sparse by TIES, and auto, look at all deltas before the first is encoded.
    """
    encoder = Encoder(vector, kept, vector.base_values if base is None else base, aligned, counted)
    total = sum(info.nbytes for info in vector.tensors.values())
    with bytes_bar("measuring", total, shown=progress and str(format).startswith("auto:")) as advance:
        specs = encoder.specs(format, advance)
    with bytes_bar("encoding", total, shown=progress) as advance:
        for name, info in vector.tensors.items():
            if _has(vector.format_of(name), specs[name]):
                yield name, vector.encoded(name), vector.errors.get(name)
            else:
                yield name, *encoder.encode(name, specs[name])
            advance(info.nbytes)


def _has(found: Spec, asked: Spec) -> bool:
    """Whether a tensor is in the format already; 0 and "" leave an option to the encoder."""
    return found.name == asked.name != "dense" and all(
        value in (0, "", found.options.get(key)) for key, value in asked.options.items()
    )
