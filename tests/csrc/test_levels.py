"""The instruction sets of csrc/cpu that this CPU has beside the best one, each in a process: a choice is for good."""

import os
import subprocess
import sys

import pytest
import torch

from tests.kernels.cases import CPP

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
SHOW = "import torch; from alignvec.compiled import cpu; print(torch.ops.alignvec.cpu_capability())"


def _run(level, *command):
    environment = os.environ | {"ALIGNVEC_CPU": level, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not CPP, reason="csrc/cpu is not built, or there is a GPU")
@pytest.mark.parametrize("level", LEVELS)
def test_the_same_cases(level):
    from alignvec.compiled import cpu  # noqa: F401

    shown = _run(level, "-c", SHOW)
    if "is not one of what this CPU runs" in shown.stderr:
        pytest.skip(f"this CPU has no {level}")
    assert shown.stdout.strip() == level
    if level == torch.ops.alignvec.cpu_capability():
        pytest.skip("the best one, which all tests run")
    files = (
        f"tests/{name}.py"
        for name in (
            "kernels/test_linear",
            "kernels/test_step",
            "csrc/test_cpu",
            "csrc/test_cpu_lossless",
            "csrc/test_cpu_step",
        )
    )
    done = _run(level, "-m", "pytest", "-q", "-k", "cpp or test_cpu", *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.skipif(not CPP, reason="csrc/cpu is not built, or there is a GPU")
def test_a_name_that_is_none():
    shown = _run("sse9", "-c", SHOW)
    assert shown.returncode != 0
    assert "ALIGNVEC_CPU=sse9 is not one of what this CPU runs: " in shown.stderr
