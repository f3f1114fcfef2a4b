"""Merge: extraction and merging of checkpoints on disk, time, bytes a second and peak memory.

Each way is a process of its own, so that peaks are its own, and of its seconds none are for starting python. Files come
from the page cache as far as memory allows. Throughput counts the weights that a call reads and writes.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignvec.recipes.models import model_path
from bench.record import Row
from bench.suite import merging, models
from bench.suite.case import Case, Setting
from bench.suite.process import python

REPEATS = 3
FIGURES = {"time": ("s", "lower"), "throughput": ("B/s", "higher"), "peak memory": ("B", "lower")}
ROOM = 4.6  # times the model: base, aligned, both vectors and an output


def cases(setting: Setting) -> list[Case]:
    absent = "" if importlib.util.find_spec("mergekit") else "mergekit is not installed"
    return [
        Case("merge", merging.IMPORTS, {"figure": "peak memory"}, "B"),
        *(
            Case(
                "merge",
                way,
                {"figure": figure},
                *how,
                missing=absent if way == merging.MERGES[merging.MERGEKIT] else "",
            )
            for way in merging.WAYS
            for figure, how in FIGURES.items()
        ),
    ]


def measure(setting: Setting, cases: Sequence[Case]) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = models.build(setting)
        free, needed = shutil.disk_usage(folder).free, ROOM * models.parameter_bytes(model)
        if free < needed:
            said = f"{1e-9 * needed:.0f} GB of files do not fit in the {1e-9 * free:.0f} GB that are free"
            yield from (case.skipped(said) for case in cases)
            return
        write(setting, model, folder)
        del model
        for way in dict.fromkeys(case.name for case in cases):
            taken = child(way, folder, 1 if setting.quick else REPEATS)
            for text in merging.FORMATS:
                if way == merging.EXTRACTS[text]:  # what is merged next
                    (folder / "output").rename(folder / text)
            rates = [taken["moved"] / seconds for seconds in taken["seconds"]]
            figures = {"time": taken["seconds"], "throughput": rates, "peak memory": [taken["peak"]]}
            yield from (case.row(figures[case.parameters["figure"]]) for case in cases if case.name == way)


def write(setting: Setting, model: nn.Module, folder: Path) -> None:
    """The base, and an aligned model that differs from it in every parameter."""
    if setting.model == "tiny":
        for name, shipped in (("base", "base"), ("aligned", "medical")):
            shutil.copytree(model_path(shipped), folder / name)
        return
    model.save_pretrained(folder / "base")
    (vector,) = models.vectors(model, "dense", 1).values()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_(vector[name])
    model.save_pretrained(folder / "aligned")


def child(way: str, folder: Path, repeats: int) -> dict[str, Any]:
    """What `merging` measured in a process of its own."""
    result: dict[str, Any] = json.loads(python("bench.suite.merging", way, str(folder), str(repeats)).splitlines()[-1])
    return result
