"""The command line, `alignvec`."""

from __future__ import annotations

import errno
import io
import os
import sys


def main() -> None:
    """Run the command line; what alignvec or the machine refuses ends in one line on standard error, exit status 2."""
    from alignvec.cli.app import app
    from alignvec.errors import AlignvecError
    from alignvec.printable import printable

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may hold what the terminal has no letters for
    try:
        app()
    except AlignvecError as error:
        _stop(str(error))
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read the output, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        where = error.filename if isinstance(error.filename, str) else "a file"
        _stop(printable(f"{where} could not be read or written: {error.strerror or error}"))


def _stop(sentence: str) -> None:
    print(f"alignvec: {sentence}", file=sys.stderr)
    sys.exit(2)
