"""Draws the results of benchmarks from the data that they stored, beside them.

`python -m bench.plot` draws every file of bench/results, `python -m bench.plot FILE` that one. A file of the suite
gives a picture a section: a module here with `draw(rows, title) -> Figure`, listed in SECTIONS.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib
import typer

from alignvec.errors import AlignvecError
from bench import record

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.plot import blend, decode, formats, kernels, memory, merge, prompting, switching

FILES = {"kernels": kernels.draw, "formats": formats.draw}
SECTIONS = {
    "switching": switching.draw,
    "decode": decode.draw,
    "prompting": prompting.draw,
    "memory": memory.draw,
    "blend": blend.draw,
    "merge": merge.draw,
}


def main(
    results: Annotated[Path | None, typer.Argument(help="The JSON file of a benchmark; by default all stored.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the picture goes; by default beside the data.")] = None,
) -> None:
    """Draw what benchmarks measured."""
    if results is None and output is not None:
        raise AlignvecError("--output is the picture of one file: name that file")
    for path in sorted(record.RESULTS.glob("*.json")) if results is None else [results]:
        _draw(path, output or path.with_suffix(".png"))


def _draw(results: Path, output: Path) -> None:
    kept = record.read(results)
    if kept.get("bench") in FILES:
        _save(FILES[kept["bench"]](kept), output)
        return
    where = f"{kept['device']}, {kept['model']}, torch {kept['versions']['torch']}, {kept['date'][:10]}"
    for section, draw in SECTIONS.items():
        if rows := [row for row in kept["rows"] if row["section"] == section and not row["missing"]]:
            _save(draw(rows, f"{section}: {where}"), output.with_stem(f"{output.stem}-{section}"))


def _save(figure: plt.Figure, path: Path) -> None:
    temporary = path.with_name(path.name + ".partial")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    temporary.replace(path)
    print(f"wrote {path}")
