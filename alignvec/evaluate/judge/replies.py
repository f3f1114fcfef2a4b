"""Replies of an endpoint by the key of what was asked, kept as JSON lines as they come."""

from __future__ import annotations

import json
import os
import threading
from io import FileIO
from pathlib import Path

from alignvec.errors import AlignvecError
from alignvec.folders import replaced, told


class Replies:
    """A dictionary of texts that any thread may add to; every entry is in the file, if there is one, at once."""

    def __init__(self, path: str | Path | None = None) -> None:
        """Read what the file has. Raises AlignvecError where it cannot be read or holds something else."""
        self.path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._texts: dict[str, str] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def __contains__(self, key: str) -> bool:
        return key in self._texts

    def __getitem__(self, key: str) -> str:
        return self._texts[key]

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, key: str, reply: str) -> None:
        """Raises AlignvecError where the file cannot be written."""
        with self._lock:
            self._texts[key] = reply
            if self.path is not None:
                with told(self.path), self.path.open("ab", buffering=0) as file:
                    _append(file, (json.dumps({"key": key, "reply": reply}) + "\n").encode())

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, UnicodeDecodeError) as error:
            raise AlignvecError(f"{path} cannot be read as replies: {error}") from None
        whole = "".join(lines[:-1] if lines and not lines[-1].endswith("\n") else lines)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._texts[str(entry["key"])] = str(entry["reply"])
            except (ValueError, KeyError, TypeError):
                raise AlignvecError(
                    f"{path}, line {number}: expected a reply with its key; choose another file"
                ) from None
        if len(whole) != sum(map(len, lines)):  # the last line was cut off by a crash: asked again, written anew
            with replaced(path) as file:
                file.write_text(whole, encoding="utf-8")


def _append(file: FileIO, line: bytes) -> None:
    """All of a line, or nothing of it: the next one would be written behind the part that a full disk took."""
    end = file.seek(0, os.SEEK_END)
    try:
        view = memoryview(line)
        while view:
            view = view[file.write(view) :]
    except OSError:
        file.truncate(end)
        raise
