"""What files cost: extraction, reading with and without checksums, merging and TIES, on a pair of random checkpoints.

`python -m bench.storage` writes a base and an aligned checkpoint of `--mb` megabytes each (bfloat16, weights of std
0.02, deltas of std 2e-5, as DPO makes them) and two vectors into a temporary folder. Every job runs in a process of its
own, `--repeats` times in turn with the others; stored are wall and processor seconds, and how far memory grew beyond
what the imports take.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file

import alignvec
from bench import record

FORMATS = ("dense", "lossless", "int8", "int4", "sign", "low-rank:rank=16", "sparse:density=0.1", "auto:0.25")
COLUMNS, ROWS = 4096, 2048
STD, STEP = 0.02, 2e-5
JOBS = {f"extract {name}": f"alignvec.extract('base', 'aligned', format={name!r}, output='out')" for name in FORMATS}
JOBS |= {
    "read": "v = alignvec.load('dense'); list(map(v.encoded, v))",
    "read, verify=False": "v = alignvec.load('dense', verify=False); list(map(v.encoded, v))",
    "merge dense": "alignvec.merge('base', {'v': 'dense'}, {'v': 0.5}, 'out')",
    "merge lossless": "alignvec.merge('base', {'v': 'lossless'}, {'v': 1.0}, 'out')",
    "ties of two": "alignvec.surgery.ties({'a': 'dense', 'b': 'dense'}, 0.2, output='out')",
}
CHILD = """
import json, time
import torch, alignvec, alignvec.surgery, alignvec.merge


def peak():  # of this program; what getrusage tells includes that of the process it was started from
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 1024


alignvec.load('small')
at_rest = peak()
wall, cpu = time.perf_counter(), time.process_time()
{job}
used = [time.perf_counter() - wall, time.process_time() - cpu]
print(json.dumps([*used, peak() - at_rest]))
"""


def main(
    output: Annotated[Path | None, typer.Option(help="Where the data go; default: a file of this device.")] = None,
    mb: Annotated[int, typer.Option(help="Size of a checkpoint.", min=17)] = 512,
    repeats: Annotated[int, typer.Option(help="Runs of every job.", min=1)] = 3,
    only: Annotated[str, typer.Option(help="Jobs whose names begin so.")] = "",
) -> None:
    """Measure what files cost on this machine."""
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    output = record.results_file("storage", "cpu") if output is None else output
    kept: dict[str, Any] = {"bench": "storage", **record.environment("cpu"), "mb": mb, "rows": []}
    record.refuse(output, kept)
    jobs = {name: job for name, job in JOBS.items() if name.startswith(only)}
    found: dict[str, list[list[float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="alignvec-storage-") as folder:
        _prepare(Path(folder), mb)
        for _ in range(repeats):
            for name, job in track(jobs.items(), console=console, transient=True):
                found[name].append(_run(Path(folder), job))
    for name, runs in found.items():
        wall, cpu, memory = (record.spread(samples) for samples in zip(*runs, strict=True))
        kept["rows"].append({"job": name, "wall_s": wall, "cpu_s": cpu, "memory_mb": memory})
    report(console, kept)
    record.write(output, kept)
    console.print(f"wrote {output}")


def _prepare(folder: Path, mb: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base, aligned = {}, {}
    for number in range(mb * 10**6 // (2 * ROWS * COLUMNS)):
        weight = (torch.randn(ROWS, COLUMNS, generator=generator) * STD).bfloat16()
        base[f"layers.{number}.weight"] = weight
        moved = weight.float() + torch.randn(ROWS, COLUMNS, generator=generator) * STEP
        aligned[f"layers.{number}.weight"] = moved.bfloat16()
    for name, tensors in (("base", base), ("aligned", aligned)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    for format in ("dense", "lossless"):
        alignvec.extract(folder / "base", folder / "aligned", format=format, output=folder / format)
    alignvec.AlignmentVector({"w": torch.ones(2)}).save(folder / "small")


def _run(folder: Path, job: str) -> list[float]:
    """Wall seconds, processor seconds and MB of memory that a job took."""
    command = [sys.executable, "-c", CHILD.format(job=job)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    shutil.rmtree(folder / "out", ignore_errors=True)
    return [float(number) for number in json.loads(done.stdout)]


def report(console: Console, kept: dict[str, Any]) -> None:
    """The medians as a table."""
    columns = ("job", "wall s", "MB/s", "processor s", "MB a processor second", "memory MB")
    table = Table(*columns, title=f"a pair of {kept['mb']} MB each, {kept['device']}, {kept['threads']} threads")
    for row in kept["rows"]:
        wall, cpu, memory = (row[key]["median"] for key in ("wall_s", "cpu_s", "memory_mb"))
        rates = f"{kept['mb'] / wall:.0f}", f"{kept['mb'] / cpu:.0f}"
        table.add_row(row["job"], f"{wall:.2f}", rates[0], f"{cpu:.2f}", rates[1], f"{memory:.0f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
