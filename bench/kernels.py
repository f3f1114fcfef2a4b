"""Times the linear operator beside a merged weight's `F.linear`, in one run on the device at hand.

`python -m bench.kernels` prints a table and writes the same numbers as JSON.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from alignvec import planner

# (out_features, in_features): layers of the shipped tiny models on a CPU, of a 7B model on a GPU.
SHAPES = {"cpu": ((688, 256), (256, 688), (4096, 256)), "cuda": ((6144, 4096), (28672, 4096), (4096, 14336))}
TOKENS = {"cpu": (1, 16, 640), "cuda": (1, 16, 64, 2048)}
CACHE_BYTES = 256 << 20


def operands(
    tokens: int, shape: tuple[int, int], k: int, rows: int, dtype: torch.dtype, device: str
) -> tuple[Tensor | None, ...]:
    """x, weight, bias, deltas, bias_deltas, columns, table, rows: every vector at a coefficient that is not zero."""
    x = torch.randn(tokens, shape[1], device=device).to(dtype)
    weight = (0.02 * torch.randn(shape, device=device)).to(dtype)
    deltas = (2e-5 * torch.randn(k, *shape, device=device)).to(dtype)
    columns = torch.arange(k, dtype=torch.int32, device=device)
    table = torch.rand(rows, k, device=device) + 0.1
    return x, weight, None, deltas, None, columns, table, torch.tensor([rows], dtype=torch.int32, device=device)


def timed(calls: list[Callable[[], Tensor]], repeats: int, device: str) -> list[float]:
    """Median microseconds of each call. The calls take turns, so that a busy or hot machine is so for all of them."""
    flush = torch.empty(CACHE_BYTES if device == "cuda" else 0, dtype=torch.int8, device=device)
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 3):
        for call, sample in zip(calls, samples, strict=True):
            if device == "cuda":
                flush.zero_()  # weights come from memory, as in a model, and not from the L2 cache
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                stop.record()
                stop.synchronize()
                elapsed = 1e3 * start.elapsed_time(stop)
            else:
                begin = time.perf_counter()
                call()
                elapsed = 1e6 * (time.perf_counter() - begin)
            if turn >= 3:
                sample.append(elapsed)
    return [statistics.median(sample) for sample in samples]


def measure(tokens: int, shape: tuple[int, int], k: int, dtype: torch.dtype, device: str, repeats: int) -> dict:
    """One shape: merged `F.linear`, one mix for all tokens, and a mix for each of up to 16 rows."""
    rows = min(tokens, 16)
    kernel = planner.linear_kernel(torch.device(device), "auto")
    uniform = operands(tokens, shape, k, 1, dtype, device)
    mixed = operands(tokens, shape, k, rows, dtype, device)
    x, weight = uniform[:2]
    calls = [
        lambda: F.linear(x, weight),
        lambda: kernel(*uniform, execution="auto", precision="exact"),
        lambda: kernel(*mixed, execution="auto", precision="exact"),
    ]
    merged, one, several = timed(calls, repeats, device)
    names = {"tokens": tokens, "out_features": shape[0], "in_features": shape[1], "k": k, "rows": rows}
    return names | {"merged_us": merged, "uniform_us": one, "mixed_us": several}


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("bench-kernels.json"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; by default what the device is used with.")
    ] = "",
    repeats: Annotated[int, typer.Option(help="Timed calls of each.")] = 30,
) -> None:
    """Time the linear operator beside F.linear with merged weights."""
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    console = Console()
    cases = list(itertools.product(SHAPES[device], TOKENS[device], (1, 3, 8)))
    results = [
        measure(tokens, shape, k, getattr(torch, dtype), device, repeats)
        for shape, tokens, k in track(cases, description="timing", console=console)
    ]
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    title = f"{name}, {dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads; medians, microseconds"
    table = Table("out x in", "tokens", "k", "merged", "one mix", "ratio", "rows", "mixed rows", "ratio", title=title)
    for r in results:
        ratios = [f"{r[key] / r['merged_us']:.2f}" for key in ("uniform_us", "mixed_us")]
        sizes = (f"{r['out_features']} x {r['in_features']}", str(r["tokens"]), str(r["k"]), f"{r['merged_us']:.0f}")
        table.add_row(*sizes, f"{r['uniform_us']:.0f}", ratios[0], str(r["rows"]), f"{r['mixed_us']:.0f}", ratios[1])
    console.print(table)
    if device != "cuda":
        console.print("Not measured on a GPU: none is at hand here.")
    record = {
        "device": name,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "results": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".partial")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(output)
    console.print(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
