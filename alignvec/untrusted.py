"""Files that strangers made: what is opened is a regular file, what is parsed has bounds, what is wrong has a sentence.

A name in a folder may stand for a pipe, a device or a loop of links, and a few bytes of JSON for gigabytes of objects.
Links to regular files are followed: the hub's cache is made of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from math import isfinite, prod
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # there are no such limits elsewhere
    resource = None  # type: ignore[assignment]

from alignvec.errors import AlignvecError
from alignvec.printable import shown

MOST_TEXT = 1 << 27  # bytes of a file that is parsed
MOST_OBJECTS = 1 << 21  # objects and arrays in it, of some 200 bytes of memory each
MOST_VALUES = 1 << 23  # values in those, of up to 70 bytes each
DEEPEST = 64  # objects and arrays inside of each other
MOST_DIMENSIONS = 32  # of a tensor; torch has 64 in places
LONGEST_NAME = 1024  # characters of a tensor's name
LARGEST_SIZE = 2**63  # what torch counts values with


def mode_of(path: Path) -> int | None:
    """What stands at a path, links followed, as `stat` has it; None for nothing. AlignvecError for what hides it."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def present(file: Path) -> bool:
    """Whether there is a regular file, or a link to one. AlignvecError for anything else that has the name."""
    mode = mode_of(file)
    if mode is None:
        if os.path.islink(file):
            raise AlignvecError(f"{file} is a link that leads nowhere: put the file in its place")
        return False
    _require_regular(file, mode)
    return True


@contextlib.contextmanager
def opened(file: Path) -> Iterator[int]:
    """A descriptor of a regular file, to read. AlignvecError for a file that cannot be read or is of another kind."""
    try:
        _require_regular(file, os.stat(file).st_mode)  # opening a device may do something
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from None
    try:
        _require_regular(file, os.fstat(descriptor).st_mode)  # and it may have been put there since
        yield descriptor
    except OSError as error:
        raise _unreadable(file, error) from None
    finally:
        os.close(descriptor)


def read_bytes(file: Path, most: int = MOST_TEXT) -> bytes:
    """All of a regular file of at most `most` bytes; AlignvecError for a larger one."""
    with opened(file) as descriptor, open(descriptor, "rb", closefd=False) as raw:
        try:
            data = raw.read(most + 1) if os.fstat(descriptor).st_size <= most else None
        except MemoryError:
            data = None
    if data is None or len(data) > most:
        raise AlignvecError(f"{file} is larger than {most} bytes, which no file of its kind is")
    return data


def read_text(file: Path) -> str:
    """A regular file's text, of at most MOST_TEXT bytes; bytes that are no UTF-8 are replaced."""
    return read_bytes(file).decode("utf-8", errors="replace")


def read_json(file: Path, *, exact: bool = False) -> dict[str, Any]:
    """A JSON object from a file of at most MOST_TEXT bytes; AlignvecError when it is none.

    exact: as this library writes them: no key twice in an object, and no number that is infinite or NaN, or an
    integer beyond 64 bits. Files of others (a tokenizer's ``model_max_length``) have such.
    """
    return parse_json(read_bytes(file), file, exact=exact)


def parse_json(raw: bytes, file: Path, *, exact: bool = False) -> dict[str, Any]:
    """As `read_json`, of bytes that were read from `file`."""
    if raw.count(b"{") + raw.count(b"[") > MOST_OBJECTS or raw.count(b",") > MOST_VALUES:
        raise AlignvecError(f"{file} has more entries than any file of its kind")
    hooks: dict[str, Any] = {}
    if exact:
        hooks = {"object_pairs_hook": _once, "parse_int": _int64, "parse_float": _finite, "parse_constant": _finite}
    try:
        data = json.loads(raw.decode("utf-8"), **hooks)
        if rb"\u" in raw:
            json.dumps(data, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair can be written nowhere
    except RecursionError:
        raise AlignvecError(f"{file} cannot be read as JSON: it is nested too deeply") from None
    except MemoryError:
        raise AlignvecError(f"{file} cannot be read as JSON: there is not enough memory for it") from None
    except ValueError as error:
        raise AlignvecError(f"{file} cannot be read as JSON ({brief(error)})") from None
    if not isinstance(data, dict):
        raise AlignvecError(f"{file} must hold a JSON object")
    level: list[Any] = [data]
    for _ in range(DEEPEST):
        level = [
            value
            for each in level
            for value in (each.values() if type(each) is dict else each)
            if type(value) in (dict, list)
        ]
        if not level:
            return data
    raise AlignvecError(f"{file} cannot be read as JSON: it is nested more than {DEEPEST} deep")


def tensor_shape(sizes: object) -> tuple[int, ...]:
    """A tensor's shape from a file, as a tuple; ValueError for what is no shape, or of more values than can be counted.

    A size of 0 makes no other size small: torch multiplies them all.
    """
    if not isinstance(sizes, list | tuple) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"shape {shown(sizes)}")
    if len(sizes) > MOST_DIMENSIONS or prod(max(size, 1) for size in sizes) >= LARGEST_SIZE:
        raise ValueError(f"shape {shown(list(sizes))} is larger than a tensor can be")
    return tuple(sizes)


def require_name(name: str, file: Path) -> None:
    """AlignvecError for the name of a tensor that is longer than LONGEST_NAME."""
    if len(name) > LONGEST_NAME:
        raise AlignvecError(f"{file} names a tensor with {len(name)} characters ({shown(name)}): it is no checkpoint's")


def require_memory(nbytes: int, what: str) -> None:
    """AlignvecError for more bytes than the machine has, or this process may have, before they are asked for: some
    systems first promise them.

    what: "the values of ...", which the sentence begins with.
    """
    most = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    if resource is not None and (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        most.append(limit)
    if most and nbytes > min(most):
        raise AlignvecError(f"{what} take {nbytes} bytes, more than there are on this machine: read them in pieces")


def brief(error: BaseException, most: int = 200) -> str:
    """An exception in one short line: what parsers say may quote the file."""
    return shown(" ".join(str(error).split()) or type(error).__name__, most)


def _require_regular(file: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for check, name in kinds if check(mode)), "a device")
        raise AlignvecError(f"{file} is {kind}, not a regular file: put the file in its place")


def _unreadable(file: Path, error: Exception) -> AlignvecError:
    reason = (error.strerror if isinstance(error, OSError) else None) or brief(error)
    return AlignvecError(f"{shown(str(file), 300)} cannot be read: {reason}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} is there twice")
    return found


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -LARGEST_SIZE <= int(digits) < 2 * LARGEST_SIZE:
        raise ValueError(f"{shown(digits, 30)} is no 64-bit number")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not isfinite(number):
        raise ValueError(f"{shown(digits, 30)} is no finite number")
    return number
