"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before triton is imported."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore = ["kernels"]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None and os.environ["TRITON_INTERPRET"] == "1":
        from tests import interpreter_bf16

        interpreter_bf16.install()


if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    os.environ.pop("COLUMNS", None)  # a worker is told its terminal's width, which the console would keep


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test draws the same numbers alone and in any order."""
    torch.manual_seed(0)
