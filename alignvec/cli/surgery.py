"""`alignvec surgery`: operations on sets of vectors, a verb each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignvec.cli.options import vectors
from alignvec.cli.terminal import console, size, table
from alignvec.errors import AlignvecError

if TYPE_CHECKING:
    from alignvec.vector import AlignmentVector

surgery = typer.Typer(
    help="""Merge, sparsify, truncate and decorrelate vectors.

    Example: alignvec surgery ties merged-av -v medical-av -v legal-av --density 0.2
    """,
    no_args_is_help=True,
)

Output = Annotated[Path, typer.Argument(help="Folder to write to; several vectors go to folders of their names in it.")]
Given = Annotated[list[str], typer.Option("--vector", "-v", help="NAME=FOLDER, or FOLDER; repeatable.")]
One = Annotated[str, typer.Argument(help="The vector's folder.")]
Density = Annotated[float, typer.Option(help="Share of the values that stay.")]
Rank = Annotated[int | None, typer.Option(help="Singular values a matrix keeps; default: as many as fit side by side.")]
Format = Annotated[str | None, typer.Option(help="To store in; default: as the operation makes them.")]
Dtype = Annotated[str | None, typer.Option(help="Of values stored as they are; default: float32.")]
Base = Annotated[str | None, typer.Option(help="The base, which lossless vectors are read with.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]


@surgery.command()
def ties(
    output: Output,
    vector: Given,
    density: Density = 0.2,
    disjoint: Annotated[str | None, typer.Option(help="mean or sum; default: mean, with --parts sum.")] = None,
    trim: Annotated[str, typer.Option(help="What the density is a share of: each vector, or each tensor.")] = "vector",
    parts: Annotated[
        bool, typer.Option("--parts", help="Keep the vectors apart: each trimmed, lost signs out.")
    ] = False,
    format: Format = None,
    dtype: Dtype = None,
    base: Base = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """TIES-merging: trim, elect signs, merge what agrees (arXiv 2306.01708).

    Example: alignvec surgery ties apart -v medical=medical-av -v legal=legal-av --density 0.2 --parts
    """
    from alignvec import surgery

    given = _opened(vector, base)
    storage = _storage(output, format, dtype, device, overwrite)
    if parts:
        _report(output, surgery.ties_parts(given, density, disjoint=disjoint or "sum", trim=trim, **storage))
    else:
        _report(output, surgery.ties(given, density, disjoint=disjoint or "mean", trim=trim, **storage))


@surgery.command()
def dare(
    vector: One,
    output: Output,
    density: Density = 0.1,
    seed: Annotated[int, typer.Option(help="Of the choice.")] = 0,
    format: Format = None,
    dtype: Dtype = None,
    base: Base = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Drop values at random and rescale the others (arXiv 2311.03099).

    Example: alignvec surgery dare medical-av medical-dare --density 0.1
    """
    from alignvec import surgery

    given = _opened([f"vector={vector}"], base)["vector"]
    storage = _storage(output, format, dtype, device, overwrite)
    _report(output, surgery.dare(given, density, seed=seed, **storage))


@surgery.command()
def truncate(
    vector: One,
    output: Output,
    rank: Annotated[int, typer.Option(help="Singular values that each matrix keeps.")] = 16,
    format: Format = None,
    dtype: Dtype = None,
    base: Base = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Keep the largest singular values of each matrix, as low-rank factors.

    Example: alignvec surgery truncate medical-av medical-16 --rank 16
    """
    from alignvec import surgery

    given = _opened([f"vector={vector}"], base)["vector"]
    _report(output, surgery.truncate(given, rank, **_storage(output, format, dtype, device, overwrite)))


@surgery.command()
def tsv(
    output: Output,
    vector: Given,
    rank: Rank = None,
    format: Format = None,
    dtype: Dtype = None,
    base: Base = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Decorrelate the vectors' singular vectors, each vector keeping its own coefficient (arXiv 2412.00081).

    Example: alignvec surgery tsv apart -v medical=medical-av -v legal=legal-av
    """
    from alignvec import surgery

    _report(output, surgery.tsv(_opened(vector, base), rank, **_storage(output, format, dtype, device, overwrite)))


@surgery.command()
def isotropic(
    output: Output,
    vector: Given,
    format: Format = None,
    dtype: Dtype = None,
    base: Base = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Merge vectors into one whose singular values are all alike (arXiv 2502.04959).

    Example: alignvec surgery isotropic merged-av -v medical-av -v legal-av
    """
    from alignvec import surgery

    _report(output, surgery.isotropic(_opened(vector, base), **_storage(output, format, dtype, device, overwrite)))


@surgery.command("remove-shared-mean")
def remove_shared_mean(
    output: Output,
    vector: Given,
    format: Format = None,
    dtype: Dtype = None,
    base: Base = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Take the vectors' mean out of each, and write it as a vector of its own, `shared`.

    Example: alignvec surgery remove-shared-mean apart -v medical=medical-av -v legal=legal-av
    """
    from alignvec import surgery

    storage = _storage(output, format, dtype, device, overwrite)
    _report(output, surgery.remove_shared_mean(_opened(vector, base), **storage))


@surgery.command()
def cosines(
    vector: Given,
    by: Annotated[str, typer.Option(help="layer or kind: the rows after the first.")] = "layer",
    base: Base = None,
) -> None:
    """Show the cosines between vectors, overall and by layer or kind of parameter.

    Example: alignvec surgery cosines -v medical=medical-av -v legal=legal-av --by kind
    """
    from alignvec import surgery

    if by not in ("layer", "kind"):
        raise AlignvecError(f"--by takes layer or kind, not {by!r}")
    found = surgery.cosines(_opened(vector, base))
    pairs = [(i, j) for i in range(len(found.names)) for j in range(i + 1, len(found.names))]
    if not pairs:
        raise AlignvecError("cosines are between vectors: give two --vector at least")
    rows = table("cosines", by, *(f"{found.names[i]}, {found.names[j]}" for i, j in pairs))
    for name, matrix in [("all", found.overall), *(found.layers if by == "layer" else found.kinds).items()]:
        rows.add_row(str(name), *(f"{float(matrix[i, j]):.3f}" for i, j in pairs))
    console.print(rows)


def _opened(given: list[str], base: str | None) -> dict[str, AlignmentVector | str | Path]:
    """The folders; lossless ones opened, with their base."""
    from alignvec.vector import AlignmentVector

    found: dict[str, AlignmentVector | str | Path] = {**vectors(given)}
    for name, folder in vectors(given).items():
        if base is not None and (vector := AlignmentVector.load(folder)).needs_base:
            found[name] = vector.with_base(base)
    return found


def _storage(output: Path, format: str | None, dtype: str | None, device: str, overwrite: bool) -> Any:
    return {
        "output": output,
        "format": format,
        "dtype": dtype,
        "device": device,
        "overwrite": overwrite,
        "progress": True,
    }


def _report(output: Path, made: AlignmentVector | dict[str, AlignmentVector]) -> None:
    for name, vector in (made if isinstance(made, dict) else {"": made}).items():
        console.print(f"{output / name}: {len(vector)} tensors, {vector.format}, {size(vector.nbytes)}")
