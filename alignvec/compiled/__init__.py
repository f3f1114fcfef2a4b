"""The libraries of csrc: loaded on first use, or the reason why one cannot run here.

`setup.py` builds them beside this file; `ALIGNVEC_LIBRARY_CPU` and `ALIGNVEC_LIBRARY_CUDA` name others. They hold
implementations of operators whose schemas are in this package's modules.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

from alignvec.errors import AlignvecError

SCHEMAS = 3  # the version that `alignvec_schemas` of a library has to name: raised when a schema here changes
CAPABILITY = (8, 0)  # the oldest GPU that csrc/cuda is compiled for


def load(part: str) -> None:
    """Load csrc/`part`, "cpu" or "cuda", once.

    Raises:
        AlignvecError: it cannot run here, with the reason.
    """
    obstacle = reason(part)
    if obstacle is not None:
        raise AlignvecError(obstacle)


@functools.cache
def reason(part: str) -> str | None:
    """Why csrc/`part` cannot run here, in a sentence; None where it is loaded."""
    if part == "cuda" and not torch.cuda.is_available():
        return "csrc/cuda needs a GPU and torch finds none"
    if part == "cuda" and torch.version.cuda is None:
        return "csrc/cuda is for NVIDIA GPUs, and this torch is built for AMD's"
    if part == "cuda" and torch.cuda.get_device_capability() < CAPABILITY:
        return f"csrc/cuda needs a GPU of compute capability 8.0 or later, and {torch.cuda.get_device_name()} is older"
    variable = f"ALIGNVEC_LIBRARY_{part.upper()}"
    library = Path(os.environ.get(variable) or Path(__file__).with_name(f"_{part}.abi3.so"))
    if not library.is_file():
        if variable in os.environ:
            return f"{variable}={library} is not there; name a library, or unset it for the one that is installed"
        tools = "a C++ compiler" if part == "cpu" else "a C++ compiler and nvcc"
        return f"csrc/{part} is not built; `pip install -v --no-build-isolation -e .` builds it with {tools}"
    try:
        if ctypes.CDLL(str(library)).alignvec_schemas() != SCHEMAS:
            return f"{library} was built from other sources; build it anew with `pip install --no-build-isolation -e .`"
        torch.ops.load_library(library)
    except (OSError, AttributeError) as error:
        message = " ".join(str(error.__cause__ or error).split())
        return f"{library} does not load ({message}); build it anew with `pip install --no-build-isolation -e .`"
    return None
