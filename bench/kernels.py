"""The linear layers of a model under vectors of every format, beside the same layers merged, in one run.

`python -m bench.kernels` prints a table and stores the same numbers as data: CUDA-graph replays of Mistral-7B's shapes
on a GPU, one decoder layer with both sides halved on a CPU. Each call's weights come from memory, each result is
checked against the float64 reference before it is timed, and nothing else should run meanwhile.
`python -m bench.plot FILE` draws what was stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import alignvec
from alignvec import planner
from alignvec.errors import AlignvecError
from alignvec.loading import load_model
from alignvec.planner.cpu import cpu_capability
from alignvec.recipes.models import model_path
from bench import record
from bench.cases import QUICK, SET_MICROSECONDS, TOKENS, cases
from bench.layers import SHAPES
from bench.measure import Bench, Row
from bench.opponents import CHAIN
from bench.timing import host_seconds, read_bandwidth


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
    output: Annotated[
        Path | None, typer.Option(help="Where the data go; by default to bench/results, for a full run.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tokens, formats and repeats.")] = False,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, as in 1,16; by default all.")] = "",
    repeats: Annotated[int, typer.Option(help="Samples of each time; 0: 50, or 15 when quick.")] = 0,
    backend: Annotated[
        str, typer.Option(help=f"{', '.join(planner.BACKENDS[:-1])} or {planner.BACKENDS[-1]}.")
    ] = "auto",
    scale: Annotated[int, typer.Option(help="Divide both sides of the shapes, for a trial.")] = 1,
    remerge: Annotated[bool, typer.Option(help="Time re-merges, too.")] = True,
    trial: Annotated[bool, typer.Option("--trial", help="The GPU's shapes and cases on a CPU, for a trial.")] = False,
) -> None:
    """Time the operator in every format beside merged weights.

    With --tokens and an --output of the same device and versions, rows of other numbers of tokens stay in it.
    """
    kind = "cuda" if device.startswith("cuda") else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise AlignvecError("there is no GPU to measure here; --device cpu measures its CPU")
    planner.check_choice("--backend", backend, planner.BACKENDS)
    backend, asked = planner.resolve_backend(kind, backend), backend
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    full = not (quick or tokens or scale > 1 or not remerge or trial or asked != "auto")
    if output is None and full:
        output = record.results_file("kernels", device)
    how = {"backend": backend, "instruction_set": cpu_capability() if backend == "cpp" else None}
    kept: dict[str, Any] = {"bench": "kernels", **record.environment(device), **how, "scale": scale}
    if output is not None:
        record.refuse(output, kept)
    repeats = repeats or (15 if quick else 50)
    kind = "cuda" if trial else kind
    shapes = tuple(shape.scaled(scale) for shape in SHAPES[kind])
    chosen = tuple(map(int, tokens.split(","))) if tokens else (QUICK if quick else TOKENS)[kind]
    bench = Bench(device, shapes, read_bandwidth(device, repeats), repeats, backend)
    before = record.read(output) if tokens and output is not None and output.exists() else {"rows": []}
    same = all(before.get(key) == kept[key] for key in ("versions", "threads", "scale", *how))
    rows = [row for row in before["rows"] if same and row.get("tokens") not in chosen and row["section"] != "set"]
    rows = [row for row in rows if row["section"] != "re-merge" or not remerge]
    kept["read_gb_per_s"] = 1e-9 * bench.bandwidth
    stamp = {key: kept[key] for key in ("commit", "date", "read_gb_per_s")}  # rows may come from several runs
    kept["rows"] = [*rows, setting(device) | stamp]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing", total=None)
        for count in chosen:
            progress.update(task, description=f"timing {count} tokens")
            kept["rows"] += [row | stamp for row in bench.linear(cases(kind, count, quick))]
            if output is not None:  # what a run that is cut short has measured
                record.write(output, kept)
        if remerge:
            progress.update(task, description="timing re-merges")
            kept["rows"] += [row | stamp for row in bench.remerge(quick)]
    report(console, kept)
    if output is not None:
        record.write(output, kept)
        console.print(f"wrote {output}")


def setting(device: str) -> Row:
    """What a change of coefficients takes on the host: three vectors on a shipped model, no step in between."""
    transformers.utils.logging.disable_progress_bar()
    base = model_path("base")
    model = load_model(base, dtype=torch.bfloat16, device_map=device)
    vectors = {name: alignvec.extract(base, model_path(name)) for name in ("medical", "legal", "financial")}
    alignment = alignvec.attach(model, vectors)
    taken = host_seconds(lambda i: alignment.set(medical=i / 1000, legal=0.3, financial=-0.2))
    times = {"median_ms": 1e3 * taken.median, "p20_ms": 1e3 * taken.p20, "p80_ms": 1e3 * taken.p80}
    return {"section": "set", "case": "coefficient change, host", "k": 3, "shape": "all", **times}


def report(console: Console, kept: dict[str, Any]) -> None:
    """The sums over the model's layers, a table for each section, dtype and number of tokens."""
    rows = [row for row in kept["rows"] if row["shape"] == "all"]
    where = f"{kept['device']}, torch {kept['versions']['torch']}, triton {kept['versions']['triton']}"
    runs = f"{kept['backend']} ({kept['instruction_set']})" if kept["instruction_set"] else kept["backend"]
    threads = f", {kept['threads']} threads" if kept["driver"] is None else ""
    console.print(f"{where}, backend {runs}{threads}; reads {kept['read_gb_per_s']:.0f} GB/s", highlight=False)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["section"], row.get("tokens"), row.get("dtype")), []).append(row)
    for (section, tokens, dtype), own in groups.items():
        if section == "set":
            micro = 1e3 * own[0]["median_ms"]
            verdict = "met" if micro <= SET_MICROSECONDS else "missed"
            console.print(f"{own[0]['case']}: {micro:.1f} us of {SET_MICROSECONDS:g} ({verdict})", highlight=False)
            continue
        title = section if tokens is None else f"{section}, {tokens} token{'s' * (tokens > 1)}"
        compared = "x merged" if tokens is not None else f"speed, x {CHAIN}"
        columns = ("", "rows", "execution", "ms", "p20", "p80", "GB/s", "of floor", compared, "target", "")
        table = Table(*columns, title=f"{title}, {dtype}, {own[0]['layers']} x {_shapes(kept, own[0])}")
        for column in table.columns[3:10]:
            column.justify = "right"
        for row in own:
            table.add_row(*_cells(row))
        console.print(table)


def _shapes(kept: dict[str, Any], total: Row) -> str:
    same = ("section", "case", "tokens", "rows", "dtype", "execution", "precision")
    parts = [r for r in kept["rows"] if r["shape"] != "all" and all(r.get(key) == total.get(key) for key in same)]
    return " + ".join(f"{r['out']}x{r['in']}" for r in parts)


def _cells(row: Row) -> tuple[str, ...]:
    times = (f"{row[f'{key}_ms']:.3f}" for key in ("median", "p20", "p80"))
    how = f"{row['execution']} {row['precision']}" if row.get("way") in ("operator", "kept") and "rows" in row else ""
    compared = row.get("ratio", row.get("speedup"))
    bandwidth = (f"{row['gb_per_s']:.0f}", f"{row['share_of_floor']:.0%}")
    return (row["case"], str(row.get("rows", "")), how, *times, *bandwidth, f"{compared:.2f}", *_verdict(row))


def _verdict(row: Row) -> tuple[str, str]:
    """The target of a row, and whether it is met; nothing where it has none."""
    if row.get("target") is not None:
        target, met = f"<= {row['target']:g}", row["ratio"] <= row["target"]
    elif row.get("target_share") is not None:
        target, met = f">= {row['target_share']:.0%} of floor", row["share_of_floor"] >= row["target_share"]
    elif row.get("target_speedup") is not None:
        target, met = f">= {row['target_speedup']:g}", row["speedup"] >= row["target_speedup"]
    else:
        return "", ""
    return target, "met" if met else "missed"


if __name__ == "__main__":
    record.command(main)
