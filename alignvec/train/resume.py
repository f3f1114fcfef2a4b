"""Work folders: whose run they hold, and the checkpoint to go on from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvec import hidden
from alignvec.checkpoint import Checkpoint
from alignvec.errors import AlignvecError
from alignvec.folders import replaced, told, write_json
from alignvec.untrusted import read_json

if TYPE_CHECKING:
    from datasets import Dataset

RUN = "alignvec_run.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # as transformers names them, by the step
STATE = "trainer_state.json"  # what transformers writes last
WEIGHTS = ("model", "adapter_model")
PICKLED = (".pt", ".pth", ".bin")  # what torch.save writes: zip files, whose list of contents comes last


def claim(path: str | Path, pairs: Dataset, settings: dict[str, Any]) -> Path:
    """Make the folder, or go on with the one of the same pairs and settings.

    Raises AlignvecError for a folder that holds another run, or other things, and for one that cannot be written.
    """
    folder, digest = Path(path), hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(pair, sort_keys=True).encode())
    run = json.loads(json.dumps({"pairs": digest.hexdigest(), "settings": settings}, default=str))
    file = folder / RUN
    with told(folder):
        if folder.is_dir():
            hidden.clear(file)
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            with replaced(file) as beside:
                write_json(beside, run)
            return folder
    if not file.is_file():
        raise AlignvecError(f"{folder} is no work folder of a training run: choose an empty one")
    try:
        found = read_json(file)
    except AlignvecError:
        raise AlignvecError(f"{file} is damaged: choose an empty work folder") from None
    if found != run:
        raise AlignvecError(f"{folder} holds a run with other pairs or options: choose an empty work folder")
    return folder


def checkpoint(folder: Path) -> str | None:
    """The folder's latest checkpoint that is whole; None where there is none. Warns of those that are not."""
    problems = {path: _problem(path) for path in _checkpoints(folder)}
    whole = [path for path, problem in problems.items() if problem is None]
    if broken := [f"{path.name} ({problem})" for path, problem in problems.items() if problem is not None]:
        where = f"from {whole[-1].name}" if whole else "from the beginning"
        warnings.warn(f"{folder}: {', '.join(broken)} cannot be gone on from; training goes on {where}", stacklevel=3)
    return str(whole[-1]) if whole else None


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """For a run that writes checkpoints into ``folder``: what cannot be written goes, and is an AlignvecError."""
    try:
        with told(folder):
            yield
    except (AlignvecError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        of_torch = "PytorchStreamWriter" in reason or "inline_container" in reason  # torch.save's own errors
        if not of_torch and not isinstance(error, AlignvecError):
            raise
        for path in _checkpoints(folder):
            if _problem(path) is not None:
                shutil.rmtree(path, ignore_errors=True)
        if not of_torch:
            raise
        raise AlignvecError(f"{folder} cannot be written: {reason}; free some space there and go on") from error


def _checkpoints(folder: Path) -> list[Path]:
    """By step, whole or not."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := CHECKPOINT.fullmatch(path.name))}
    return [found[step] for step in sorted(found) if found[step].is_dir()]


def _problem(path: Path) -> str | None:
    """Why a run cannot go on from a checkpoint; None for one that is whole.

    Transformers writes weights, then the state of the optimiser, of its schedule and of random numbers, and at last its
    own. One that was killed leaves the last file out, or the one that it was at cut short.
    """
    try:
        if type(read_json(path / STATE).get("global_step")) is not int:
            return f"{STATE} names no step"
        stems = [stem for stem in WEIGHTS if any(path.glob(f"{stem}.safetensors*"))]
        for stem in stems:
            Checkpoint.open(path, stem=stem)
        for file in sorted(file for file in path.iterdir() if file.suffix in PICKLED and file.is_file()):
            with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(file):
                continue
            return f"{file.name} is cut short"
    except (AlignvecError, OSError):
        return "it was not written to its end" if not (path / STATE).is_file() else "a file of it is damaged"
    return None if stems or any(path.glob("pytorch_model*")) else "it holds no weights"
