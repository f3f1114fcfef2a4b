"""Work folders: whose run they hold, and the checkpoint to go on from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvec.errors import AlignvecError
from alignvec.writer import replaced, write_json

if TYPE_CHECKING:
    from datasets import Dataset

RUN = "alignvec_run.json"


def claim(path: str | Path, pairs: Dataset, settings: dict[str, Any]) -> Path:
    """Make the folder, or go on with the one of the same pairs and settings.

    Raises AlignvecError for a folder that holds another run, or other things.
    """
    folder, digest = Path(path), hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(pair, sort_keys=True).encode())
    run = json.loads(json.dumps({"pairs": digest.hexdigest(), "settings": settings}, default=str))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        file = folder / RUN
        if not file.is_file():
            raise AlignvecError(f"{folder} is no work folder of a training run: choose an empty one")
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise AlignvecError(f"{file} is damaged: choose an empty work folder") from None
        if found != run:
            raise AlignvecError(f"{folder} holds a run with other pairs or options: choose an empty work folder")
    else:
        with replaced(folder / RUN) as beside:
            write_json(beside, run)
    return folder


def checkpoint(folder: Path) -> str | None:
    """The folder's latest checkpoint."""
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
