"""Results as data: where and with what they were measured, written beside and renamed, one device a file.

A row of the suite (`bench/suite/case.py`) has `section`, `name`, `parameters`, `unit`, `better`, `target`; `median`,
`p20`, `p80` and the number of `samples`, or why it is `missing`; and the `commit` and `date` of its run. Rows of the
other benchmarks are described where they are made.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import typer

from alignvec.errors import AlignvecError
from alignvec.kernels.configs import file_name

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def environment(device: str) -> dict[str, Any]:
    """The device, its driver, the versions, the commit and the date of a measurement."""
    return {
        "device": device_name(device),
        "driver": _driver(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "transformers": _version("transformers"),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def device_name(device: str) -> str:
    """What the device calls itself."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return re.sub(r"\((R|TM)\)", "", model) or platform.processor() or platform.machine()


def spread(samples: Sequence[float]) -> Row:
    """The median of some samples, the range from p20 to p80, and how many they are; of none, nothing."""
    if not samples:
        return {"median": None, "p20": None, "p80": None, "samples": 0}
    low, middle, high = (float(value) for value in numpy.percentile(samples, (20, 50, 80)))
    return {"median": middle, "p20": low, "p80": high, "samples": len(samples)}


def results_file(bench: str, device: str) -> Path:
    """Where the results of a benchmark on that device are kept: a file each, CPUs' too."""
    return RESULTS / f"{bench}-{file_name(device_name(device))}"


def refuse(path: Path, record: dict[str, Any]) -> None:
    """AlignvecError where a file holds what another device, or another benchmark, gave."""
    if not path.exists():
        return
    for key in ("bench", "device"):
        found, wanted = read(path).get(key), record[key]
        if found != wanted:
            raise AlignvecError(f"{path} holds results of {found!r}, not of {wanted!r}; choose another --output")


def write(path: Path, record: dict[str, Any]) -> None:
    """The record as JSON, in place of one of the same device; a row is a line."""
    refuse(path, record)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in record["rows"])
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A record as it was written. Raises AlignvecError where there is none."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AlignvecError(f"cannot read the results {path}: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("rows"), list):
        raise AlignvecError(f"{path} holds no results of a benchmark; python -m bench.kernels writes some")
    return record


def command(main: Callable[..., None]) -> None:
    """Run a benchmark's command line; an AlignvecError is a sentence, not a traceback."""
    try:
        typer.run(main)
    except AlignvecError as error:
        sys.exit(str(error))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver(device: str) -> str | None:
    if not device.startswith("cuda"):
        return None
    if shutil.which("nvidia-smi"):
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    return None


def _commit() -> str | None:
    """The commit that is checked out, with a plus where files differ from it."""
    if not shutil.which("git"):
        return None
    root = str(RESULTS.parents[1])
    commit = _output("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    return f"{commit}+" if commit and _output("git", "-C", root, "status", "--porcelain", "-uno") else commit or None


def _output(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""
