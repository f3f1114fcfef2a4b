"""The benchmark suite: `python -m bench.run [SECTION ...]` measures what this machine can and stores it as data.

Rows go to bench/results/suite-<device>.json. A section that is run again replaces its own rows; the others' stay while
model, device and versions are the same. Nothing else should run meanwhile. `python -m bench.plot` draws the results.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from alignvec.errors import AlignvecError
from bench import record
from bench.record import Row
from bench.suite import registry
from bench.suite.case import MODELS, Case, Setting
from bench.suite.report import report


def main(
    sections: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(registry.SECTIONS)}; default all.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
    model: Annotated[
        str, typer.Option(help=f"{', '.join(MODELS)}; by default the first on a GPU, the second on a CPU.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option(help="Where the data go; by default to bench/results, for a full run.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The tiny model and few samples: does everything run?")
    ] = False,
) -> None:
    """Measure the suite, or some of its sections."""
    setting = choose(device, model, quick)
    names = registry.chosen(sections or ())
    if output is None and not quick and setting.model == choose(device).model:
        output = record.results_file("suite", device)
    kept: Row = {"bench": "suite", **record.environment(device), "model": setting.model, "rows": []}
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    if output is not None:
        record.refuse(output, kept)
        kept["rows"] = before(output, kept, names, console)
    stamp = {key: kept[key] for key in ("commit", "date")}
    for name in names:
        begin = time.perf_counter()
        rows = [row | stamp for row in run(name, setting, console)]
        kept["rows"] = registry.ordered([*(row for row in kept["rows"] if row["section"] != name), *rows])
        report(console, name, rows)
        console.print(f"{name}: {time.perf_counter() - begin:.0f} s", highlight=False)
        if output is not None:  # what a run that is cut short has measured
            record.write(output, kept)
    if output is not None:
        console.print(f"wrote {output}")


def choose(device: str, model: str = "", quick: bool = False) -> Setting:
    """The setting that the options ask for. Raises AlignvecError for a device that is not there, an unknown model."""
    cuda = device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise AlignvecError("there is no GPU to measure here; --device cpu measures its CPU")
    model = model or ("tiny" if quick else "mistral-7b" if cuda else "small")
    if model not in MODELS:
        raise AlignvecError(f"--model {model!r} is not one of {', '.join(MODELS)}")
    return Setting(model, device, quick)


def before(path: Path, kept: Row, names: list[str], console: Console) -> list[Row]:
    """The rows that a file has, where they were measured on the same model with the same versions."""
    if not path.exists():
        return []
    found = record.read(path)
    rows = [row for row in found["rows"] if row["section"] in registry.SECTIONS]
    changed = [key for key in ("versions", "threads", "model", "driver") if found.get(key) != kept[key]]
    if not changed:
        return rows
    if gone := ", ".join(dict.fromkeys(row["section"] for row in rows if row["section"] not in names)):
        console.print(f"{' and '.join(changed)} changed: the rows of {gone} in {path} are dropped; run them again")
    return []


def run(name: str, setting: Setting, console: Console) -> list[Row]:
    """The rows of a section, in the order of its cases.

    Raises AlignvecError where the section gave none, or two, for one of them.
    """
    module = registry.section(name)
    listed: list[Case] = module.cases(setting)
    found: dict[Any, Row] = {_key(row): row for row in (case.skipped(case.missing) for case in listed if case.missing)}
    wanted = [case for case in listed if not case.missing]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, torch.no_grad():
        task = progress.add_task(name, total=len(wanted))
        for row in module.measure(setting, wanted):
            if _key(row) in found:
                raise AlignvecError(f"section {name} gave two rows for {row['name']} {row['parameters']}")
            found[_key(row)] = row
            progress.update(task, advance=1, description=f"{name}: {row['name']}")
    gc.collect()
    if setting.kind == "cuda":
        torch.cuda.empty_cache()
    for case in listed:
        if _key(case.skipped("")) not in found:
            raise AlignvecError(f"section {name} gave no row for {case.name} {dict(case.parameters)}")
    if len(found) != len(listed):
        raise AlignvecError(f"section {name} gave {len(found)} rows for {len(listed)} cases")
    return [found[_key(case.skipped(""))] for case in listed]


def _key(row: Row) -> tuple[Any, ...]:
    return row["name"], tuple(sorted(row["parameters"].items()))


if __name__ == "__main__":
    record.command(main)
