"""One way to extract or merge, in a process of its own: `python -m bench.suite.merging WAY FOLDER REPEATS`.

FOLDER holds `base`, `aligned`, and for merges the vectors `dense` and `lossless`; `output` goes there, too. Prints
JSON: `seconds` of each call, `peak` (resident bytes, pages of mapped files included) and `moved` (bytes read and
written).
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

import alignvec

COEFFICIENT = 0.5
LOOP, MERGEKIT, IMPORTS = "torch loop", "mergekit", "imports alone"
FORMATS = ("dense", "lossless")
SECONDS = 6.0  # after which no further call is begun
EXTRACTS = {text: f"extract, {text}" for text in FORMATS} | {LOOP: f"extract, {LOOP}"}
MERGES = {text: f"merge, {text}" for text in FORMATS} | {LOOP: f"merge, {LOOP}", MERGEKIT: f"merge, {MERGEKIT}"}


def extract(folder: Path, output: Path, text: str) -> None:
    """alignvec's, streamed."""
    alignvec.extract(folder / "base", folder / "aligned", format=text, output=output)


def merge(folder: Path, output: Path, text: str) -> None:
    """alignvec's, streamed, with the base verified and the realised coefficients measured."""
    alignvec.merge(folder / "base", {"v1": folder / text}, {"v1": COEFFICIENT}, output)


def extract_loop(folder: Path, output: Path) -> None:
    """What people write: both models in memory, and a subtraction."""
    base, aligned = _loaded(folder / "base"), _loaded(folder / "aligned")
    _store({name: aligned[name] - base[name] for name in base}, output)


def merge_loop(folder: Path, output: Path) -> None:
    """The same for a merge."""
    base, vector = _loaded(folder / "base"), _loaded(folder / "dense")
    _store({name: base[name] + COEFFICIENT * vector[name] if name in vector else base[name] for name in base}, output)


def mergekit(folder: Path, output: Path) -> None:
    """mergekit's task arithmetic, which subtracts and adds in one go, from the two checkpoints."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    model = {"model": str(folder / "aligned"), "parameters": {"weight": COEFFICIENT}}
    config = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": [model]}
    run_merge(MergeConfiguration.model_validate(config), str(output), options=MergeOptions())


WAYS: dict[str, Callable[[Path, Path], None]] = {
    **{EXTRACTS[text]: partial(extract, text=text) for text in FORMATS},
    EXTRACTS[LOOP]: extract_loop,
    **{MERGES[text]: partial(merge, text=text) for text in FORMATS},
    MERGES[LOOP]: merge_loop,
    MERGES[MERGEKIT]: mergekit,
}


def inputs(way: str, folder: Path) -> tuple[Path, ...]:
    """The folders that a way reads."""
    if way in EXTRACTS.values() or way == MERGES[MERGEKIT]:
        return folder / "base", folder / "aligned"
    text = next(text for text, name in MERGES.items() if name == way)
    return folder / "base", folder / ("dense" if text == LOOP else text)


def run(way: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of up to `repeats` calls of a way, the process's peak, and the bytes that a call reads and writes."""
    if way == IMPORTS:
        return {"seconds": [], "peak": peak(), "moved": 0}
    output = folder / "output"
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < SECONDS:
        shutil.rmtree(output, ignore_errors=True)
        begin = time.perf_counter()
        WAYS[way](folder, output)
        seconds.append(time.perf_counter() - begin)
    moved = sum(map(nbytes, (*inputs(way, folder), output)))
    return {"seconds": seconds, "peak": peak(), "moved": moved}


def peak() -> int:
    """Most bytes that this process had in memory."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux getrusage tells of the parent, too, where that was larger
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def nbytes(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _loaded(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def _store(tensors: dict[str, Tensor], output: Path) -> None:
    output.mkdir()
    save_file(tensors, output / "model.safetensors")


if __name__ == "__main__":
    way, folder, repeats = sys.argv[1:]
    print(json.dumps(run(way, Path(folder), int(repeats))))
