"""`alignvec inspect`: where vectors act, what they take, and what their formats lost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from alignvec.cli.terminal import console, size, table
from alignvec.printable import printable

if TYPE_CHECKING:
    from alignvec.statistics import LayerStatistics
    from alignvec.vector import AlignmentVector

STORED = ("format", "bytes", "of dense", "error", "SNR")


def inspect(
    folders: Annotated[list[Path], typer.Argument(help="One or several vectors.")],
    base: Annotated[str | None, typer.Option(help="The base: norms relative to its weights; lossless deltas.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="A row a tensor instead of a layer.")] = False,
) -> None:
    """Show where a vector acts, layer by layer, and what storing it took and lost; of several, their cosines too.

    Example: alignvec inspect medical-av legal-av
    """
    from alignvec.statistics import dense_bytes, total_error
    from alignvec.vector import AlignmentVector

    opened = {str(folder): AlignmentVector.load(folder) for folder in folders}
    if base is not None:
        opened = {name: vector.with_base(base) if vector.needs_base else vector for name, vector in opened.items()}
    for name, vector in opened.items():
        title = f"{name}: {vector.format}, {len(vector)} tensors, {size(vector.nbytes)}"
        for shown in [_tensors(title, vector)] if tensors else _layers(title, vector, base):
            console.print(shown)
        error = total_error(vector)
        dense = sum(dense_bytes(vector, each) for each in vector)
        lost = "error not measured" if error is None else f"error {_error(error)}, SNR {_snr(error)}"
        console.print(f"{size(vector.nbytes)} of {size(dense)} dense ({vector.nbytes / max(dense, 1):.1%}); {lost}")
        if not vector.verified:
            console.print("no checksums: an early version wrote it; alignvec convert writes it anew, with them")
        if vector.needs_base:
            console.print("lossless deltas are steps from the base's values: --base shows where they act")
    if len(opened) > 1:
        if unread := [name for name, vector in opened.items() if vector.needs_base]:
            console.print(f"no cosines without --base: {', '.join(unread)} cannot be read")
            return
        names = list(opened)
        cosines = table("cosines", "", *(str(i + 1) for i in range(len(names))))
        for i, name in enumerate(names):
            cosines.add_row(f"{i + 1} {name}", *(f"{opened[name].cosine(opened[other]):.3f}" for other in names))
        console.print(cosines)


def _layers(title: str, vector: AlignmentVector, base: str | None) -> list[Table]:
    """Where the vector acts, and what it takes."""
    from alignvec.statistics import statistics

    acts = table(title, "layer", "parameters", "changed", "norm", "largest change", *(["norm / base"] if base else []))
    takes = table("as stored", "layer", *STORED, numeric_from=2)
    for layer in statistics(vector, base):
        cells = [f"{layer.parameters:,}", _shown(layer.changed, ".1%"), _shown(layer.norm, ".4g")]
        cells.append(_shown(layer.max_abs, ".3g"))
        if base:
            cells.append(_shown(layer.relative_norm, ".2e"))
        acts.add_row(str(layer.layer), *cells)
        takes.add_row(str(layer.layer), _formats(layer), *_stored(layer.nbytes, layer.dense_bytes, layer.error))
    return [acts, takes]


def _tensors(title: str, vector: AlignmentVector) -> Table:
    from alignvec.statistics import dense_bytes

    rows = table(title, "tensor", *STORED, numeric_from=2)
    for name in vector:
        error = vector.errors.get(name)
        cells = _stored(vector.stored_bytes(name), dense_bytes(vector, name), None if error is None else error.relative)
        rows.add_row(printable(name), str(vector.format_of(name)), *cells)
    return rows


def _formats(layer: LayerStatistics) -> str:
    return "\n".join(layer.formats) or "-"


def _stored(nbytes: int, dense: int, error: float | None) -> list[str]:
    if not dense:
        return ["-"] * 4
    lost = ["-", "-"] if error is None else [_error(error), _snr(error)]
    return [size(nbytes), f"{nbytes / dense:.1%}", *lost]


def _error(error: float) -> str:
    return f"{error:.2e}" if error else "exact"


def _snr(error: float) -> str:
    return f"{-20 * math.log10(error):.1f} dB" if error else "infinite"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
