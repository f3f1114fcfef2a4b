"""The command line, `alignvec`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; input that alignvec refuses ends in one line on standard error and exit status 2."""
    from alignvec.cli.app import app
    from alignvec.errors import AlignvecError

    try:
        app()
    except AlignvecError as error:
        print(f"alignvec: {error}", file=sys.stderr)
        sys.exit(2)
