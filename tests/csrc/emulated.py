"""Builds csrc/cuda for the host, on its emulator, as a library whose operator serves CPU tensors."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def build(folder: Path) -> Path:
    """The library, in `folder`. Every file is compiled on its own, two at a time."""
    sources = [p for p in sorted(SOURCES.glob("*.cu")) if p.name != "grid.cu"]
    sources += sorted((SOURCES / "emulator").glob("*.cpp"))
    flags = ["-std=c++17", "-O2", "-fPIC", "-U_FORTIFY_SOURCE", "-DTORCH_TARGET_VERSION=0x020a000000000000", *WARNINGS]
    objects = []
    waiting = [
        [compiler(), *flags, "-isystem", str(TORCH / "include"), "-x", "c++", "-c", str(source)] for source in sources
    ]
    while waiting:
        running = []
        for command in waiting[:2]:
            objects.append(folder / f"{Path(command[-1]).parent.name}-{Path(command[-1]).stem}.o")
            running.append(subprocess.Popen([*command, "-o", str(objects[-1])], stderr=subprocess.PIPE, text=True))
        for process in running:
            errors = process.communicate()[1]
            assert process.returncode == 0, errors
        waiting = waiting[2:]
    library = folder / "emulated.so"
    linking = ["-shared", "-o", str(library), *map(str, objects), "-L", str(TORCH / "lib"), "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler(), *linking, f"-Wl,-rpath,{TORCH / 'lib'}"], check=True)
    return library
