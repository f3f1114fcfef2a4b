"""What tests do in processes of their own, where they are killed, or find no room on the disk."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import alignvec
from alignvec import AlignmentVector, convert, extract, merge
from alignvec.checkpoint import Checkpoint
from alignvec.peft import to_peft

LIMIT = 40_000  # bytes a file may have where there is no room
SHAPE = (256, 512)
TENSORS = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight")
VALUES = (1, 2, 3)

context = multiprocessing.get_context("forkserver")  # torch is imported once, and no thread of it is forked
context.set_forkserver_preload(["tests.storage.children", "pytest"])


def prepare(folder: Path) -> None:
    """A base of zeros, aligned models that hold one number each, and the vectors that lead there."""
    for value in (0, *VALUES):
        (folder / f"m{value}").mkdir()
        shapes = {name: SHAPE if "norm" not in name else SHAPE[1:] for name in TENSORS}
        tensors = {name: torch.full(shape, float(value), dtype=torch.bfloat16) for name, shape in shapes.items()}
        save_file(tensors, folder / f"m{value}" / "model.safetensors", metadata={"format": "pt"})
        (folder / f"m{value}" / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    for value in VALUES:
        extract(folder / "m0", folder / f"m{value}", output=folder / f"v{value}")


def _extract(folder: Path, value: int, output: Path) -> None:
    extract(folder / "m0", folder / f"m{value}", output=output, max_shard_size="300KB", overwrite=True)


def _convert(folder: Path, value: int, output: Path) -> None:
    convert(folder / f"v{value}", output, "sign", overwrite=True)


def _merge(folder: Path, value: int, output: Path) -> None:
    merge(folder / "m0", {"v": folder / "v1"}, {"v": value}, output, overwrite=True)


def _save(folder: Path, value: int, output: Path) -> None:
    (alignvec.load(folder / "v1") * value).save(output, max_shard_size="300KB", overwrite=True)


WRITERS: dict[str, Callable[[Path, int, Path], None]] = {
    "extract": _extract,
    "convert": _convert,
    "merge": _merge,
    "save": _save,
}


def found(output: Path) -> set[float]:
    """All values of what lies there, which is opened as its users open it."""
    if (output / "alignment_vector.json").exists():
        vector = AlignmentVector.load(output)
        assert set(vector) == set(TENSORS)
        return {float(value) for name in vector for value in vector.read(name).unique()}
    checkpoint = Checkpoint.open(output)
    assert set(checkpoint.tensors) == set(TENSORS)
    return {float(value) for name in checkpoint.tensors for value in checkpoint.tensor(name).float().unique()}


def by_two_renames(*names: object) -> None:
    """In the place of `hidden.exchange`: a file system that exchanges no names."""
    raise OSError(22, "Invalid argument")


def write(writer: str, folder: Path, value: int, output: Path, exchanging: bool, begun: Any) -> None:
    """The main function of a child; it says through a pipe when it begins."""
    torch.set_num_threads(1)
    if not exchanging:
        from alignvec import hidden

        hidden.exchange = by_two_renames  # type: ignore[assignment]
    begun.send(None)
    WRITERS[writer](folder, value, output)
    begun.send(None)


def killed(process: Any, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was done
        os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == -number or process.exitcode == 0


ON_DISK: dict[str, Callable[[Path, Path], object]] = {
    "extract": lambda f, out: extract(f / "base", f / "aligned", output=out, overwrite=True),
    "extract encoded": lambda f, out: extract(f / "base", f / "aligned", output=out, format="int8", overwrite=True),
    "convert": lambda f, out: convert(f / "dense", out, "int8", overwrite=True),
    "merge": lambda f, out: merge(f / "base", {"v": f / "dense"}, {"v": 0.5}, out, overwrite=True),
    "save": lambda f, out: (alignvec.load(f / "dense") * 2).save(out, overwrite=True),
    "peft": lambda f, out: to_peft(alignvec.load(f / "low"), out, overwrite=True),
}


def limited(writer: str, folder: Path, output: Path, answer) -> None:  # type: ignore[no-untyped-def]
    """A child whose files may have LIMIT bytes: the system says EFBIG where it would say ENOSPC on a full disk."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    try:
        ON_DISK[writer](folder, output)
    except BaseException as error:
        answer.send((type(error).__name__, str(error)))
    else:
        answer.send(("", "it was written"))
