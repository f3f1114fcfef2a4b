"""The package as a whole: what importing it does, and that `kernels/` never shadows another package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_initialises_neither_cuda_nor_triton() -> None:
    code = "import sys, alignvec, torch; print('triton' in sys.modules, torch.cuda.is_initialized())"
    assert run(code, ROOT) == "False False"


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_kernels_is_ours_and_only_under_alignvec(where: str, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, transformers, alignvec.kernels.reference as r\n"
        "from transformers import MistralForCausalLM\n"
        "from transformers.utils import is_kernels_available\n"
        "s = u.find_spec('kernels')\n"
        "print(r.__name__, is_kernels_available(), s is None or s.origin is None)"
    )
    assert run(code, ROOT if where == "root" else tmp_path) == "alignvec.kernels.reference False True"


@pytest.mark.slow
def test_a_plain_install_holds_kernels_and_models(tmp_path: Path) -> None:
    """Not editable: the wheel itself carries kernels, libraries, the typing marker and the recipes' data."""
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-q", "--target"]
    environment = os.environ | {"ALIGNVEC_BUILD": "auto"}
    subprocess.run([*install, str(target), str(ROOT)], check=True, cwd=tmp_path, env=environment)
    assert (target / "alignvec/kernels/reference.py").is_file()
    assert (target / "alignvec/py.typed").is_file()
    assert (target / "alignvec/recipes/models/base/model.safetensors").is_file()
    assert not (target / "kernels").exists()
    assert (target / "alignvec/compiled/_cpu.abi3.so").is_file() or shutil.which("c++") is None
    code = f"import sys; sys.path.insert(0, {str(target)!r}); import alignvec.kernels.reference as r; print(r.__file__)"
    assert run(code, tmp_path).startswith(str(target))
