"""What stands beside a target while it is written: a hidden folder that its writer locks, and what dead writers left.

A folder `.NAME.HEX.partial` is being filled, or holds what an exchange took away. Its writer holds a lock on it for as
long as it lives, so that the next writer of the target removes what a killed one left and nothing else. `.NAME.HEX.old`
is what stood at the target, where a file system cannot exchange two names and it is moved away for a moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h
LONGEST = 200  # bytes of a name that the hidden name repeats; file systems allow 255
TRIES = 10


@contextlib.contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A new hidden folder beside ``target``, locked until the block ends and removed then; leftovers go first."""
    put_back(target)
    clear(target)
    folder, descriptor = _locked(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def put_back(target: Path) -> None:
    """Give back to ``target`` what a writer had moved away that died before it put the new one there."""
    if os.path.lexists(target):
        return
    with contextlib.suppress(OSError):  # another process has given it back, or put something there
        moved = [folder for folder in _beside(target, "old") if not _is_locked(folder)]
        if moved:
            max(moved, key=lambda folder: folder.stat().st_ctime_ns).rename(target)


def recover(path: str | Path) -> None:
    """``put_back`` for a reader, who may name anything."""
    with contextlib.suppress(OSError, ValueError):
        if not os.path.exists(path):
            put_back(Path(os.path.realpath(path)))


def clear(target: Path) -> None:
    """Remove what dead writers of ``target`` left; what a living one fills stays, as where no lock can tell."""
    if os.path.lexists(target):
        for folder in _beside(target, "old"):
            _discard(folder)
    for folder in _beside(target, "partial"):
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def put(new: Path, target: Path, replaceable: Callable[[], object]) -> None:
    """Make the folder ``new`` the folder ``target``: in one step, or not at all.

    Where ``target`` holds something ``replaceable`` is called, which raises unless that may go; ``new`` holds it then.
    Where the file system exchanges no names, a kill between two renames leaves what ``put_back`` mends.
    """
    for _ in range(TRIES):
        try:
            os.rename(new, target)  # free, or an empty folder
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            replaceable()
            exchange(new, target)
            return
        except FileNotFoundError:  # another writer has just moved it away
            continue
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):  # a sandbox says the last
                raise
        if _put_by_two(new, target):
            return
    raise OSError(errno.EBUSY, "other processes keep replacing it", str(target))


def _put_by_two(new: Path, target: Path) -> bool:
    """``put`` with two renames; False where another process was faster."""
    old = target.with_name(f".{_stem(target)}.{uuid.uuid4().hex[:8]}.old")
    try:
        with _held(target):
            try:
                target.rename(old)
                new.rename(target)
            except BaseException:
                with contextlib.suppress(OSError):  # another process has put something there, or given this back
                    old.rename(target)
                raise
            finally:
                if os.path.lexists(target):
                    _discard(old)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
        return False
    return True


def _discard(old: Path) -> None:
    """Remove what was moved away, under a name that is never given back: a kill meanwhile leaves a part of it."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(old.rename(old.with_suffix(".partial")), ignore_errors=True)


def exchange(one: Path, other: Path) -> None:
    """Let two names change places in one step. Raises OSError, ENOSYS or EINVAL where that cannot be done."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))


def sync(path: Path) -> None:
    """Have a file, or a folder with all that it holds, on the disk before this returns."""
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
        sync_names(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_names(folder: Path) -> None:
    """Have the names in a folder on the disk, where it may be read; some file systems cannot be asked for that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _locked(target: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor that holds its lock."""
    while True:
        folder = target.with_name(f".{_stem(target)}.{uuid.uuid4().hex[:8]}.partial")
        folder.mkdir()
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # taken for a leftover before it was locked
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        except OSError:  # no locks here: nobody will remove it
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return folder, descriptor
        os.close(descriptor)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A lock on a folder that is about to be moved, which says that its mover lives."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_locked(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _stem(target: Path) -> str:
    name = target.name
    return name if len(os.fsencode(name)) <= LONGEST else hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def belongs(path: Path, target: Path, kind: str = "partial") -> bool:
    """Whether ``path`` has the name of a hidden folder of ``target``."""
    pattern = rf"\.{re.escape(_stem(target))}\.[0-9a-f]{{8}}\.{kind}"
    return path.parent == target.parent and re.fullmatch(pattern, path.name, re.DOTALL) is not None


def _beside(target: Path, kind: str) -> list[Path]:
    """The hidden folders of ``target`` that are there, links left aside."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            path = target.parent / name
            if belongs(path, target, kind) and path.is_dir() and not path.is_symlink():
                found.append(path)
    return found
