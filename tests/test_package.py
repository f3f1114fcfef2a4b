"""The package as a whole: what importing it does, and that `kernels/` never shadows another package."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import alignvec

ROOT = Path(__file__).parents[1]


def run(code: str, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = "[name for name in ('torch', 'transformers', 'numpy', 'safetensors', 'triton') if name in sys.modules]"
FUNCTIONS = ("attach", "check", "convert", "extract", "merge")  # that share their names with the modules they are in


def test_importing_initialises_neither_cuda_nor_triton() -> None:
    code = "import sys, alignvec, torch; alignvec.attach; print('triton' in sys.modules, torch.cuda.is_initialized())"
    assert run(code, ROOT) == "False False"


def test_importing_loads_nothing_heavy() -> None:
    code = f"import sys, alignvec; from alignvec import AlignvecError; dir(alignvec); print({HEAVY})"
    assert run(code, ROOT) == "[]"


def test_every_public_name_is_there_and_listed() -> None:
    assert set(alignvec._LAZY) | {"AlignvecError"} == set(alignvec.__all__)
    assert set(alignvec.__all__) <= set(dir(alignvec))
    named: dict[str, object] = {}
    exec("from alignvec import *", named)
    assert set(alignvec.__all__) <= named.keys()
    for name in alignvec.__all__:
        assert named[name] is getattr(alignvec, name)
        assert callable(named[name])
    assert alignvec.attach is sys.modules["alignvec.attach"].attach
    assert alignvec.fingerprint.identify is sys.modules["alignvec.fingerprint"].identify
    with pytest.raises(AttributeError, match="module 'alignvec' has no attribute 'nothing'"):
        alignvec.nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from alignvec import nothing")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_pickles_and_copies(name: str) -> None:
    function = getattr(alignvec, name)
    assert pickle.loads(pickle.dumps(function)) is function
    assert copy.deepcopy(function) is function


def test_a_function_is_never_its_module() -> None:
    first = ["import alignvec.extract", "from alignvec.attach import attach", "import alignvec.check as module"]
    after = ["import alignvec", "alignvec.merge", "import alignvec.merge, alignvec.convert"]
    checks = [
        f"assert alignvec.{name}.__module__ == 'alignvec.{name}' and callable(alignvec.{name})" for name in FUNCTIONS
    ]
    assert run("\n".join([*first, *after, *checks, "print('fine')"]), ROOT) == "fine"


ORDERS = [
    "import {0}.greet",
    "import {0}.greet as greet; assert greet() == 'hello'",
    "from {0}.greet import greet; assert greet() == 'hello'",
    "from {0} import greet; assert greet() == 'hello'",
    "import {0}.other",
    "import importlib; importlib.import_module('{0}.greet')",
    "import {0}; {0}.greet; import {0}.greet",
    "import {0}.greet, importlib, sys; importlib.reload(sys.modules['{0}.greet'])",
]


@pytest.mark.parametrize("number", range(len(ORDERS)), ids=ORDERS)
def test_orders_of_importing(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small package of the same class: `greet` is a function in a module `greet`."""
    name = f"small_package_{number}"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "greet.py").write_text("def greet():\n    return 'hello'\n")
    (tmp_path / name / "other.py").write_text(f"import {name}.greet\n")
    lines = [
        "import sys",
        "from alignvec.lazy import Package",
        f"_LAZY = {{'greet': '{name}.greet'}}",
        "sys.modules[__name__].__class__ = Package",
    ]
    (tmp_path / name / "__init__.py").write_text("\n".join(lines))
    exec(ORDERS[number].format(name), {})
    assert sys.modules[name].greet() == "hello"
    assert isinstance(sys.modules[f"{name}.greet"], ModuleType)
    assert sys.modules[name].other is sys.modules[f"{name}.other"]


def test_a_function_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignvec, "merge", len)
    assert alignvec.merge("ab") == 2
    monkeypatch.undo()
    assert alignvec.merge is sys.modules["alignvec.merge"].merge


def test_operators_are_registered_when_they_are_first_needed() -> None:
    code = "import torch, alignvec.ops; print(hasattr(torch.ops.alignvec, 'linear'))"
    assert run(code, ROOT) == "True"


@pytest.mark.slow
def test_any_part_can_be_imported_first() -> None:
    """Each in a process of its own, forked when what they all need is there."""
    code = """
import importlib, os, pathlib, rich.progress, transformers, typer
import alignvec
root = pathlib.Path(alignvec.__file__).parent
files = [*root.glob("*.py"), *root.glob("*/__init__.py")]
for name in sorted({".".join(file.relative_to(root.parent).with_suffix("").parts) for file in files}):
    child = os.fork()
    if not child:
        importlib.import_module(name.removesuffix(".__init__"))
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print("failed:", name)
"""
    assert run(code, ROOT) == ""


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
