"""`python -m bench.paper [EXPERIMENT ...]`: run the paper's experiments, keep their data, write the report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from alignvec.folders import replaced
from bench import record
from bench.paper import experiments
from bench.paper.report import RESULTS, write_report
from bench.paper.setting import SHIPPED, Setting, open_setting


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Experiments: {', '.join(experiments.NAMES)}; default all.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(SHIPPED)}, or a TOML file with base, questions and vectors; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
    scale: Annotated[float, typer.Option(help="Multiplies every number of questions.")] = 1.0,
    results: Annotated[Path, typer.Option(help="Where the data are kept.")] = RESULTS,
    report: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("docs/paper"),
    keep: Annotated[bool, typer.Option("--keep", help="Do not run again what has data.")] = False,
) -> None:
    """Run experiments on a shipped or on your own model; a run that is cut short goes on with --keep.

    Example: python -m bench.paper sweeps targets --setting my-7b.toml --device cuda
    """
    chosen = experiments.chosen(names or ())
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    for label in setting or SHIPPED:
        opened = open_setting(label, device=device, scale=scale)
        opened.results = results / opened.name
        wanted = [
            name for name in chosen if names or label not in experiments.SHORT or name in experiments.SHORT[label]
        ]
        for name in wanted:
            output = opened.results / f"{name}.json"
            if not (keep and output.exists()):
                run(name, opened, output, console)
    write_report(results, report)
    console.print(f"report in {report}/README.md")


def run(name: str, setting: Setting, output: Path, console: Console) -> None:
    """One experiment; its data with device, versions and date."""
    module = experiments.module(name)
    if lack := getattr(module, "needs", lambda _: "")(setting):
        console.print(f"{setting.name} {name}: not run, {lack}")
        return
    begin = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:

        def track(what: str) -> Any:
            task = progress.add_task(f"{name}: {what}", total=1.0)
            return lambda share: progress.update(task, completed=share)

        setting.track = track
        data = module.run(setting)
    seconds = time.perf_counter() - begin
    entry = {
        "experiment": name,
        "setting": setting.name,
        "seconds": round(seconds, 1),
        **record.environment(setting.device),
    }
    with replaced(output) as file:
        file.write_text(json.dumps({**entry, "data": data}) + "\n", encoding="utf-8")
    console.print(f"{setting.name} {name}: {seconds:.0f} s")


if __name__ == "__main__":
    record.command(main)
