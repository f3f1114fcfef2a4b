"""The commands on stored models and vectors: extract, convert, check, merge; the others have files of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignvec import __version__
from alignvec.cli.demo import demo
from alignvec.cli.distil import distil
from alignvec.cli.env import env
from alignvec.cli.evaluate import evaluate
from alignvec.cli.generate import generate
from alignvec.cli.inspect import inspect
from alignvec.cli.options import mix, vectors
from alignvec.cli.search import search
from alignvec.cli.surgery import surgery
from alignvec.cli.terminal import console, size, table
from alignvec.cli.train import train
from alignvec.cli.tune import tune

if TYPE_CHECKING:
    from alignvec.vector import AlignmentVector

HELP = "Alignment vectors: extract them, look at them, dial them, merge them."
app = typer.Typer(
    name="alignvec",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"alignvec {__version__}")
        raise typer.Exit()


@app.callback(help=HELP)
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What `alignvec` takes before a verb."""


app.command()(inspect)
app.command()(generate)
app.command()(demo)
app.command()(env)
app.command()(evaluate)
app.command()(search)
app.command()(tune)
app.command()(train)
app.command()(distil)
app.add_typer(surgery, name="surgery")

VectorOption = Annotated[list[str], typer.Option("--vector", "-v", help="NAME=FOLDER of a vector; repeatable.")]
TransferOption = Annotated[bool, typer.Option("--transfer", help="The vectors come from a different base, on purpose.")]
FORMAT = "dense, lossless, int8, int4:group=64, sign, low-rank:rank=16, sparse:density=0.1, auto:0.25, ..."
IncludeOption = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="PATTERN", help="Keep only tensors of names such as '*.mlp.*'; repeatable."),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="Leave out tensors of names such as '*norm*'; repeatable."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]


@app.command()
def extract(
    base: Annotated[str, typer.Argument(help="The model before preference tuning: a folder, a file or a hub id.")],
    aligned: Annotated[str, typer.Argument(help="The model after it.")],
    output: Annotated[Path, typer.Argument(help="Folder to write the vector to.")],
    format: Annotated[str, typer.Option(help=FORMAT)] = "dense",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    dtype: Annotated[str | None, typer.Option(help="Of the stored deltas; default: as found.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
    overwrite: OverwriteOption = False,
) -> None:
    """Write the difference of two checkpoints as an alignment vector, streamed in bounded memory.

    Example: alignvec extract base/ aligned/ medical-av/
    """
    import alignvec

    vector = alignvec.extract(
        base,
        aligned,
        format=format,
        include=include,
        exclude=exclude,
        dtype=dtype,
        output=output,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=True,
    )
    console.print(f"{output}: {_summary(vector)}, norm {_norm(vector):.4g}")
    inexact = vector.source.get("inexact_values", 0)
    if inexact:
        console.print(
            f"{inexact} differences are not exact in the checkpoints' dtype; --dtype float32 keeps them whole"
        )


def _norm(vector: AlignmentVector) -> float:
    """The vector's norm, from what encoding recorded where that lost nothing, so that no value is read again."""
    errors = [vector.errors.get(name) for name in vector]
    known = [error.norm for error in errors if error is not None and not error.relative and error.norm is not None]
    return math.hypot(*known) if len(known) == len(errors) else vector.norm()


@app.command()
def convert(
    vector: Annotated[Path, typer.Argument(help="A vector's folder, or a PEFT adapter's.")],
    output: Annotated[Path, typer.Argument(help="Folder to write to.")],
    format: Annotated[str | None, typer.Option(help=FORMAT + " Or peft: an adapter. Default: as it is.")] = None,
    base: Annotated[str | None, typer.Option(help="The base, for lossless vectors and some adapters.")] = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    dtype: Annotated[str | None, typer.Option(help="Of values stored as they are; default: as found.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
    overwrite: OverwriteOption = False,
) -> None:
    """Write a vector in another format; PEFT LoRA adapters come in, and low-rank vectors go out as adapters.

    Example: alignvec convert medical-av medical-int4 --format int4
    """
    import alignvec

    converted = alignvec.convert(
        vector,
        output,
        format,
        base=base,
        include=include,
        exclude=exclude,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=True,
    )
    console.print(f"{output}: " + ("an adapter for PEFT" if converted is None else _summary(converted)))


@app.command()
def check(
    base: Annotated[str, typer.Argument(help="The base model.")],
    vector: VectorOption,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this picture file.")] = None,
    dtype: Annotated[str, typer.Option(help="The dtype that the model is served in.")] = "bfloat16",
    transfer: TransferOption = False,
) -> None:
    """Compare the coefficient asked for with the one that a 16-bit merge, and alignvec, really apply.

    Example: alignvec check base/ -v medical-av --plot realised.png
    """
    import alignvec
    from alignvec.check import plot as draw
    from alignvec.pictures import require_picture

    if plot is not None:
        require_picture(plot)
    rows = alignvec.check(base, vectors(vector), dtype=dtype, transfer=transfer)
    for label in dict.fromkeys(row.vector for row in rows):
        own = table(f"{label}: realised coefficients in {dtype}", "requested", "merged", "alignvec", numeric_from=0)
        for row in rows:
            if row.vector == label:
                own.add_row(f"{row.requested:.1f}", f"{row.naive:.3f}", f"{row.alignvec:.4f}")
        console.print(own)
        for title, errors in (
            ("merged", [abs(r.naive - r.requested) for r in rows if r.vector == label]),
            ("alignvec", [abs(r.alignvec - r.requested) for r in rows if r.vector == label]),
        ):
            console.print(f"{label}: largest error {title}: {max(errors):.1e}")
    if plot is not None:
        draw(rows, plot)
        console.print(f"drawn in {plot}")


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="The base model: a folder, a file or a hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to write the merged model to.")],
    vector: VectorOption,
    mixture: Annotated[list[str], typer.Option("--mix", "-m", help="NAME=NUMBER of every vector, commas allowed.")],
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id of the tokenizer to write; default: the base's.")
    ] = None,
    rounding: Annotated[str, typer.Option(help="nearest, or stochastic: unbiased in 16 bits.")] = "nearest",
    seed: Annotated[int, typer.Option(help="Of stochastic rounding.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="Store in another dtype than the base's.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest file; default: the base's files.")] = None,
    transfer: TransferOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Write base + coefficients * vectors as an ordinary checkpoint, and say which coefficients it realises.

    Example: alignvec merge base/ merged/ -v medical-av -v legal-av -m medical-av=0.7,legal-av=-0.3
    """
    import warnings

    import alignvec
    from alignvec.tokenizer_files import TokenizerWarning

    given: Mapping[str, AlignmentVector | Path] = vectors(vector)
    if include or exclude:
        from alignvec.selection import selected_in_each

        opened = {name: alignvec.load(folder) for name, folder in vectors(vector).items()}
        given = selected_in_each(opened, include, exclude)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TokenizerWarning)  # it is shown below, in a line of its own
        report = alignvec.merge(
            base,
            given,
            mix("--mix", mixture),
            output,
            rounding=rounding,
            seed=seed,
            dtype=dtype,
            max_shard_size=max_shard_size,
            tokenizer=tokenizer,
            progress=True,
            transfer=transfer,
            overwrite=overwrite,
        )
    rows = table(f"{output}", "vector", "requested", "realised")
    for name, requested in report.requested.items():
        rows.add_row(name, f"{requested:g}", f"{report.realised[name]:.4f}")
    console.print(rows)
    for note in report.notes:
        console.print(note, soft_wrap=True)


def _summary(vector: AlignmentVector) -> str:
    from alignvec.statistics import total_error

    error = total_error(vector)
    lost = f", relative error {error:.2e}" if error and vector.format != "dense" else ""
    return f"{len(vector)} tensors, {vector.format}, {size(vector.nbytes)}{lost}"
