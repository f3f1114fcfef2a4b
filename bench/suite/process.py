"""Measurements in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from alignvec.errors import AlignvecError

ROOT = Path(__file__).parents[2]


def python(*arguments: str, **environment: str) -> str:
    """What `python -m arguments` prints. Raises AlignvecError with the last line where it fails."""
    command = (sys.executable, "-m", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise AlignvecError(f"python -m {' '.join(arguments)} failed: {said}")
    return done.stdout
