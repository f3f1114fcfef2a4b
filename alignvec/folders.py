"""Folders and files that appear whole or not at all, and take the place of what the library wrote alone."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from safetensors import SafetensorError

from alignvec import hidden
from alignvec.errors import AlignvecError
from alignvec.owned import is_weights, not_ours

ADVICE = {
    errno.ENOSPC: "free some space there, or choose another output",
    errno.EDQUOT: "free some of your quota there, or choose another output",
    errno.EFBIG: "raise the limit on the size of files, or ask for smaller shards",
    errno.EACCES: "choose an output that you may write to",
    errno.EPERM: "choose an output that you may write to",
    errno.EROFS: "choose an output that you may write to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the disk, or choose another output",
    errno.EMFILE: "raise the limit on open files",
}
ELSEWHERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.EXDEV}
ELSEWHERE |= {errno.EBUSY, errno.ESTALE, errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.ENFILE, errno.ETXTBSY}
_given: set[Path] = set()  # folders that this process is writing


@contextlib.contextmanager
def output_folder(
    path: str | Path,
    *,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    check: Callable[[Path], object] | None = None,
) -> Iterator[Path]:
    """A hidden folder beside ``path`` to write into; it is ``path`` when the block ends, and gone when that fails.

    What is written is on the disk before it takes the place of what is there, in one step. A link is followed. Given a
    folder that a block like this is writing, it is that folder, as it is.

    ``overwrite``: a vector or checkpoint that is there may go. ``inputs``: files and folders that are read, which
    ``path`` must not be, nor hold. ``check``: called with what was written before it takes its place; what it raises
    leaves the place as it was.

    Raises AlignvecError, before anything is written, for a ``path`` that holds something (with ``overwrite``: anything
    that the library did not write), a file, the current folder, and a mount point; and where writing fails.
    """
    if (given := Path(path)) in _given:
        yield given
        if check is not None:
            _checked(check, given, given)
        return
    path = _followed(path)
    with told(path):
        hidden.put_back(path)
        with contextlib.suppress(FileNotFoundError):  # another writer moves it: it is looked at again when it is put
            _require_free(path, overwrite, inputs)
        with _parents(path), hidden.workplace(path) as folder:
            _given.add(folder)
            try:
                yield folder
            finally:
                _given.discard(folder)
            if check is not None:
                _checked(check, folder, path)
            hidden.sync(folder)
            hidden.put(folder, path, lambda: _require_free(path, overwrite, inputs))
            hidden.sync_names(path.parent)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write to; it takes the place of ``path`` when the block ends well, else it goes.

    Raises AlignvecError where writing fails, and for what is no plain file.
    """
    path = _followed(path)
    with told(path):
        if path.exists() and not path.is_file():
            raise AlignvecError(f"{path} is no plain file: choose another output")
        with _parents(path), hidden.workplace(path) as folder:
            yield folder / path.name
            hidden.sync(folder / path.name)
            (folder / path.name).replace(path)
            hidden.sync_names(path.parent)


@contextlib.contextmanager
def steady(folder: Path) -> Iterator[None]:
    """For reading several files of a folder: AlignvecError where it was replaced meanwhile."""
    try:  # while it is open no other folder gets its number
        descriptor = os.open(folder, os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY))
    except (OSError, ValueError):
        yield  # what is read in it says why
        return
    try:
        yield
    finally:
        opened = os.fstat(descriptor)
        os.close(descriptor)
        if not _is_same(opened, folder):
            raise AlignvecError(f"{folder} was replaced while it was opened: open it again")


def _is_same(opened: os.stat_result, folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(opened, os.stat(folder))
    return False


def write_json(file: Path, data: object, indent: int = 2) -> None:
    """Write JSON that every reader takes. Raises AlignvecError for NaN, infinity and what JSON has no word for."""
    file.write_text(as_json(file.name, data, indent) + "\n", encoding="utf-8")


def as_json(name: str, data: object, indent: int | None = None) -> str:
    """What ``write_json`` writes to a file called ``name``."""
    try:
        return json.dumps(data, indent=indent, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise AlignvecError(f"{name} cannot be written, for JSON cannot hold what it says: {error}") from None


def nulled(data: Any) -> Any:
    """The same data, with null in the place of NaN and infinity: for figures, of which one may be unknown."""
    if isinstance(data, Mapping):
        return {key: nulled(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [nulled(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Errors of the system while ``path`` is written as AlignvecError: the file, the reason, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in ADVICE and error.errno not in ELSEWHERE:
            raise
        raise AlignvecError(_sentence(path, error)) from error
    except SafetensorError as error:
        if (code := re.search(r"os error (\d+)", str(error))) is None:
            raise AlignvecError(f"{path} cannot be written: {error}") from error
        raise AlignvecError(_sentence(path, OSError(int(code[1]), os.strerror(int(code[1]))))) from error


def _sentence(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    given = error.filename if isinstance(error.filename, str) else ""
    if given and not _is_of(Path(given), path):
        return f"{given} cannot be read or written: {reason}; {path} was not written"
    advice = ADVICE.get(error.errno or 0, "choose another output")
    blocking = next((parent for parent in path.parents if os.path.exists(parent) and not os.path.isdir(parent)), None)
    if blocking is not None:
        reason = f"{blocking} is no folder"
    return f"{path} cannot be written: {reason}; {advice}"


def _is_of(file: Path, path: Path) -> bool:
    """Whether a file belongs to what is written to ``path``: it, what is above it, or in the hidden folder beside."""
    if file == path or file in path.parents or path in file.parents:
        return True
    return any(hidden.belongs(place, path) for place in (file, *file.parents))


def _followed(path: str | Path) -> Path:
    """Where a path leads, links followed."""
    try:
        real = Path(os.path.realpath(path))
        os.fsencode(real)
    except ValueError:
        raise AlignvecError(f"{str(path)!r} is no path: choose another output") from None
    if os.path.islink(real):
        raise AlignvecError(f"{path} is a link that leads nowhere: choose another output")
    return real


def _require_free(path: Path, overwrite: bool, inputs: Iterable[Path]) -> None:
    """AlignvecError unless ``path`` may be made, or replaced."""
    current = Path(os.path.realpath(os.curdir))
    if path == current or path in current.parents:
        raise AlignvecError(f"{path} is the current folder, or holds it: choose another output, a folder in it")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not S_ISDIR(mode):
        raise AlignvecError(f"{path} exists and is a file: choose another output")
    if _is_mount(path):
        raise AlignvecError(f"{path} is a mount point, which cannot be replaced: choose another output, a folder in it")
    names = sorted(os.listdir(path))
    if not names:
        return
    if not overwrite:
        raise AlignvecError(f"{path} exists and is not an empty folder: choose another output, or set overwrite")
    if not os.access(path, os.W_OK | os.X_OK):
        raise AlignvecError(f"{path} may not be changed, so it will not be overwritten: choose another output")
    if not any(is_weights(name) for name in names):
        raise AlignvecError(f"{path} holds no safetensors file, so it will not be overwritten: choose another output")
    for source in inputs:
        for real in _real(source):
            if real.is_relative_to(path):
                raise AlignvecError(f"{path} holds the input {source}: choose another output")
    if (foreign := not_ours(path)) is not None:
        raise AlignvecError(
            f"{path} holds {foreign}, which alignvec did not write, so it will not be overwritten: move that away, or "
            "choose another output"
        )


def _real(source: Path) -> Iterator[Path]:
    """An input, and the files of a folder, where links lead to: a hub's cache is a folder of links."""
    yield Path(os.path.realpath(source))
    if source.is_dir():
        yield from (Path(os.path.realpath(file)) for file in source.iterdir())


def _is_mount(path: Path) -> bool:
    """Whether something is mounted there, from the same file system, too, where the system tells."""
    if os.path.ismount(path):
        return True
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
        places = (re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4]) for line in lines)
        return str(path) in places
    return False


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Folders above ``path``, made where they are missing, and taken away again on failure."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


def _checked(check: Callable[[Path], object], folder: Path, path: Path) -> None:
    try:
        check(folder)
    except AlignvecError as error:
        reason = str(error).replace(str(folder), str(path))
        raise AlignvecError(f"{path} is not written, since it could not be read: {reason}") from None
