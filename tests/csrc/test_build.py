"""setup.py's decisions and the libraries' loading, on a stand-in for csrc; and that csrc/cpu compiles for arm64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# One operator over the stable ABI, apart from alignvec's own.
STAND_IN = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

torch::stable::Tensor same(torch::stable::Tensor x) { return torch::stable::clone(x); }

STABLE_TORCH_LIBRARY(alignvec_stand_in, m) { m.def("same(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(alignvec_stand_in, CompositeExplicitAutograd, m) { m.impl("same", TORCH_BOX(&same)); }
"""
USE = """
import sys, torch
from alignvec import compiled
compiled.load("cpu")
print(torch.ops.alignvec_stand_in.same(torch.arange(3)).tolist())
"""
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is on PATH")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with setup.py and one source."""
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/cpu/stand_in.cpp").write_text(STAND_IN)
    (tmp_path / "alignvec/compiled").mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def build(checkout: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("ALIGNVEC_")}
    command = [sys.executable, *options, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=checkout, env=ours | environment, capture_output=True, text=True, check=False)


def library(checkout: Path) -> Path:
    return checkout / "alignvec/compiled/_cpu.abi3.so"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ours | environment, capture_output=True, text=True, check=False
    )


@needs_compiler
def test_auto_builds_what_it_can_and_says_the_rest(checkout: Path) -> None:
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "alignvec: csrc/cuda left out: it has no sources here\n"
    used = run(USE, ALIGNVEC_LIBRARY_CPU=str(library(checkout)))
    assert used.stdout == "[0, 1, 2]\n", used.stderr
