"""`alignvec env`: versions, devices, and which backends are live, with the reasons why others are not."""

from __future__ import annotations

import importlib.metadata
import platform

import alignvec
from alignvec.cli.terminal import console, table

PACKAGES = ("torch", "triton", "transformers", "safetensors", "accelerate", "trl", "numpy")


def env() -> None:
    """Show versions, devices and backends.

    Example: alignvec env
    """
    import torch

    from alignvec.planner.explain import backends, table_in_use, typical

    rows = table("alignvec", "what", "value", numeric_from=9)
    rows.add_row("alignvec", alignvec.__version__)
    rows.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        try:
            rows.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            rows.add_row(package, "not installed")
    rows.add_row("cpu threads", str(torch.get_num_threads()))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.add_row(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        rows.add_row("tuned table", table_in_use(properties.name))
    if not torch.cuda.is_available():
        rows.add_row("cuda", "no device")
    for name, state in backends():
        rows.add_row(f"backend {name}", state)
    for device in [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["H200"]:
        rows.add_row(f"plan on {device}{'' if ':' in device else ', not here'}", typical(device))
    rows.add_row("plan on cpu", typical("cpu"))
    rows.add_row("deterministic", "always: no kernel adds with atomics, sums of split inputs are added in order")
    console.print(rows)
