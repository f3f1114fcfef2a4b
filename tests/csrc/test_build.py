"""setup.py's decisions and the libraries' loading, on a stand-in for csrc; and that csrc/cpu compiles for arm64."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

from alignvec import AlignvecError, compiled

ROOT = Path(__file__).parents[2]
# One operator over the stable ABI, apart from alignvec's own.
STAND_IN = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

torch::stable::Tensor same(torch::stable::Tensor x) { return torch::stable::clone(x); }

extern "C" __attribute__((visibility("default"))) int alignvec_schemas() { return 3; }
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
ARM64 = shutil.which("aarch64-linux-gnu-g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is on PATH")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with setup.py and one source."""
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/cpu/stand_in.cpp").write_text(STAND_IN)
    (tmp_path / "alignvec/compiled").mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("ALIGNVEC_") and name != "CXX"}
    return subprocess.run(command, cwd=cwd, env=ours | environment, capture_output=True, text=True, check=False)


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], checkout, **environment)


def use(code: str, **environment: str) -> str:
    done = run([sys.executable, "-c", code], ROOT, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def library(checkout: Path) -> Path:
    return checkout / "alignvec/compiled/_cpu.abi3.so"


@needs_compiler
def test_auto_builds_what_it_can_says_the_rest_and_the_library_works(checkout: Path) -> None:
    done = build(checkout, ALIGNVEC_WERROR="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "alignvec: csrc/cuda left out: it has no sources here\n"
    assert use(USE, ALIGNVEC_LIBRARY_CPU=str(library(checkout))) == "[0, 1, 2]\n"


@needs_compiler
def test_a_cuda_part_is_left_out_where_torch_has_none(checkout: Path) -> None:
    """And nothing is asked for by `0`."""
    (checkout / "csrc/cuda").mkdir()
    (checkout / "csrc/cuda/stand_in.cu").write_text("not read")
    if torch.version.cuda is None:
        done = build(checkout, ALIGNVEC_BUILD="cuda")
        assert done.returncode == 1
        assert "csrc/cuda left out: torch has no CUDA\nALIGNVEC_BUILD=cuda asks for it." in done.stderr
        library(checkout).unlink()
    done = build(checkout, ALIGNVEC_BUILD="0")
    assert (done.returncode, done.stdout) == (0, "")
    assert not library(checkout).exists()


def test_without_a_compiler(checkout: Path) -> None:
    library(checkout).write_text("of before")
    done = build(checkout, PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "alignvec: csrc/cpu left out: no C++ compiler was found (c++, g++ or clang++ on PATH); csrc/cuda left out: "
    )
    assert done.stdout.count("\n") == 1
    assert not library(checkout).exists()
    done = build(checkout, PATH="/nowhere", ALIGNVEC_BUILD="cpu", CXX="c++20")
    assert done.returncode == 1
    assert "alignvec: csrc/cpu left out: no C++ compiler was found (c++20 on PATH)\n" in done.stderr


@needs_compiler
def test_what_does_not_compile_is_left_out_and_does_not_stay(checkout: Path) -> None:
    library(checkout).write_text("of before")
    (checkout / "csrc/cpu/stand_in.cpp").write_text("int f() { return nothing; }\n")
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("alignvec: csrc/cpu left out: csrc/cpu/stand_in.cpp failed to compile; ")
    assert "nothing" in done.stdout  # the compiler's words
    assert not library(checkout).exists()
    done = build(checkout, ALIGNVEC_BUILD="cpu")
    assert done.returncode == 1
    assert "csrc/cpu/stand_in.cpp failed to compile" in done.stderr


@needs_compiler
def test_warnings_are_errors_where_asked(checkout: Path) -> None:
    with (checkout / "csrc/cpu/stand_in.cpp").open("a") as source:
        source.write("int first(int a, int) { unsigned b = 0; return a < b; }\n")
    assert build(checkout, ALIGNVEC_BUILD="cpu").returncode == 0
    done = build(checkout, ALIGNVEC_BUILD="cpu", ALIGNVEC_WERROR="1")
    assert done.returncode == 1
    assert "sign-compare" in done.stderr


def test_a_bad_choice(checkout: Path) -> None:
    done = build(checkout, ALIGNVEC_BUILD="gpu")
    assert done.returncode == 1
    assert done.stderr == "ALIGNVEC_BUILD='gpu' is not one of auto, cpu, cuda, 0\n"


@pytest.fixture
def decisions() -> ModuleType:
    """setup.py's functions; importing it builds nothing."""
    spec = importlib.util.spec_from_file_location("alignvec_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_compiler
def test_torch_is_found_where_alignvec_goes(
    decisions: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An isolated build has its interpreter's folder of packages, but cannot import what is in it."""
    mine = decisions.find_torch()
    assert (mine.folder, mine.cuda) == (Path(torch.__file__).parent, torch.version.cuda)
    assert mine.version == tuple(map(int, torch.__version__.split(".")[:2]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert decisions.find_torch() is None
    assert decisions.obstacle("cpu", None).startswith(f"torch is not installed in {tmp_path}")
    (tmp_path / "torch/include").mkdir(parents=True)
    (tmp_path / "torch/version.py").write_text("__version__ = '2.9.1+cu128'\ncuda: Optional[str] = '12.8'\n")
    found = decisions.find_torch()
    assert found == (tmp_path / "torch", (2, 9), "12.8")
    assert decisions.obstacle("cpu", found) == "torch 2.9 is older than 2.10"


@pytest.mark.parametrize(
    ("known", "codes"),
    [
        ("sm_80\nsm_90\nsm_100\n", ["sm_80", "sm_90a", "sm_100", "compute_100"]),
        ("sm_75\nsm_80\nsm_90\n", ["sm_80", "sm_90a", "compute_90"]),
    ],
    ids=["cuda-13", "cuda-12.6"],
)
def test_architectures_are_those_that_nvcc_knows(
    decisions: ModuleType, monkeypatch: pytest.MonkeyPatch, known: str, codes: list[str]
) -> None:
    monkeypatch.setattr(decisions, "call", lambda command, what: known)
    flags = [flag for flag in decisions.device_flags() if flag.startswith("-gencode")]
    assert [flag.rpartition("code=")[2] for flag in flags] == codes


def test_reasons_why_a_library_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reason(part: str = "cpu") -> str | None:
        return compiled.reason.__wrapped__(part)

    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.delenv("ALIGNVEC_LIBRARY_CPU", raising=False)
    missing = "csrc/cpu is not built; `pip install -v --no-build-isolation -e .` builds it with a C++ compiler"
    assert reason() == missing
    (tmp_path / "_cpu.abi3.so").write_text("no library")
    assert re.fullmatch(rf"{tmp_path}/_cpu.abi3.so does not load \(.*\); build it anew with .*", str(reason()))
    monkeypatch.setenv("ALIGNVEC_LIBRARY_CPU", "/nowhere/library.so")
    assert str(reason()).startswith("ALIGNVEC_LIBRARY_CPU=/nowhere/library.so is not there; ")
    if not torch.cuda.is_available():
        assert reason("cuda") == "csrc/cuda needs a GPU and torch finds none"
    monkeypatch.setattr(compiled, "reason", lambda part: missing)
    with pytest.raises(AlignvecError, match="csrc/cpu is not built"):
        compiled.load("cpu")


def test_importing_alignvec_loads_no_library() -> None:
    code = "import sys, alignvec; print(any('/compiled/_c' in line for line in open('/proc/self/maps')))"
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc here to see what is loaded")
    assert use(code) == "False\n"
    if compiled.reason("cpu") is None:
        assert use(code.replace("print", "alignvec.compiled.load('cpu'); print")) == "True\n"


def test_without_the_library_a_model_runs_in_torch() -> None:
    code = """
        from alignvec import attach, planner
        from tests.models import random_vector, tiny
        model = tiny()
        attach(model, {"a": random_vector(model, 1)}).set(a=1.0)
        print(planner.resolve_backend("cpu"), model.generate(max_new_tokens=2, do_sample=False).numel() > 0)
    """
    assert use(textwrap.dedent(code), ALIGNVEC_LIBRARY_CPU="absent") == "torch True\n"


FRAMEWORK_FREE = [f for f in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if not f.stem.startswith("bind")]


@pytest.mark.skipif(ARM64 is None, reason="aarch64-linux-gnu-g++ is not on PATH")
@pytest.mark.parametrize("source", FRAMEWORK_FREE, ids=lambda source: source.stem)
def test_csrc_cpu_compiles_for_arm64(source: Path, tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    done = run([str(ARM64), *flags, "-c", str(source), "-o", str(tmp_path / "made.o")], ROOT)
    assert done.returncode == 0, done.stderr


def test_only_binding_files_include_torch() -> None:
    files = [f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".h", ".cpp", ".cuh", ".cu")]
    files = [f for f in files if not f.stem.startswith("bind")]
    assert files
    assert [f.name for f in files if re.search(r"#\s*include\s*[<\"](torch|ATen|c10)/", f.read_text())] == []


def test_a_library_of_other_schemas_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (command := shutil.which("c++") or shutil.which("g++")):
        pytest.skip("there is no C++ compiler")
    source, library = tmp_path / "old.cpp", tmp_path / "old.so"
    source.write_text('extern "C" int alignvec_schemas() { return 0; }\n')
    subprocess.run([command, "-shared", "-fPIC", source, "-o", library], check=True)
    monkeypatch.setenv("ALIGNVEC_LIBRARY_CPU", str(library))
    said = compiled.reason.__wrapped__("cpu")
    assert said is not None
    assert said.startswith(f"{library} was built from other sources; build it anew")
