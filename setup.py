"""Packages of alignvec, and the libraries of csrc where this machine can build them.

`ALIGNVEC_BUILD` says which: "auto", the default (what the machine can, and a line on what was left out), "cpu"
(csrc/cpu, or an error), "cuda" (both, or an error) or "0" (none). `ALIGNVEC_WERROR=1` makes warnings errors,
`ALIGNVEC_SANITIZE=1` adds the address and undefined-behaviour sanitizers to csrc/cpu.
torch is found and not imported: an isolated build has none of its own, but the place where alignvec goes has.
`kernels/` is a folder of its own and importable only as `alignvec.kernels`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PARTS = {"auto": ("cpu", "cuda"), "cpu": ("cpu",), "cuda": ("cpu", "cuda"), "0": ()}
ARCHITECTURES = ("80", "90a", "100")
# The stable ABI of torch 2.10: what is built against one torch loads in later ones, on any Python.
FLAGS = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
HOST = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall"]
# With AMX's tiles in plain C++, so that they are tested on any CPU, too.
SANITIZE = [
    "-DALIGNVEC_AMX_EMULATED",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-O1",
    "-g",
]


class BuildError(Exception):
    """What failed, and the command with what it printed."""


class Torch(NamedTuple):
    folder: Path
    version: tuple[int, ...]
    cuda: str | None


def find_torch() -> Torch | None:
    """The torch of this interpreter, or else the one installed where alignvec goes."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    for folder in (*folders, *(Path(sysconfig.get_path(name), "torch") for name in ("purelib", "platlib"))):
        if (folder / "version.py").is_file() and (folder / "include").is_dir():
            text = (folder / "version.py").read_text()
            version = re.search(r"__version__ = ['\"](\d+)\.(\d+)", text)
            cuda = re.search(r"^cuda\b.*= ['\"]([^'\"]+)", text, re.MULTILINE)
            return Torch(folder, tuple(map(int, version.groups())) if version else (), cuda and cuda[1])
    return None


def compiler() -> list[str]:
    """The command of the C++ compiler; empty where there is none."""
    name, *options = shlex.split(os.environ.get("CXX", "")) or [""]
    found = filter(None, map(shutil.which, [name] if name else ["c++", "g++", "clang++"]))
    return [path, *options] if (path := next(found, None)) else []


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def sources(part: str) -> list[str]:
    return sorted(str(f.relative_to(ROOT)) for f in (ROOT / "csrc" / part).glob("*") if f.suffix in (".cpp", ".cu"))


def obstacle(part: str, torch: Torch | None) -> str | None:
    """Why csrc/`part` cannot be built here; None where it can."""
    if not sources(part):
        return "it has no sources here"
    if not compiler():
        return f"no C++ compiler was found ({os.environ.get('CXX') or 'c++, g++ or clang++'} on PATH)"
    if torch is None:
        folder = sysconfig.get_path("purelib")
        return f"torch is not installed in {folder} (install it before, or give pip --no-build-isolation)"
    if torch.version < (2, 10):
        return f"torch {'.'.join(map(str, torch.version))} is older than 2.10"
    if part == "cuda" and torch.cuda is None:
        return "torch has no CUDA"
    return "nvcc was not found (on PATH, or in CUDA_HOME)" if part == "cuda" and nvcc() is None else None


def call(command: list[str], what: str) -> str:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise BuildError(what, f"{shlex.join(command)}\n{done.stdout}")
    return done.stdout


def device_flags() -> list[str]:
    """nvcc's architectures, as far as it knows them, and PTX for those to come."""
    known = call([str(nvcc()), "--list-gpu-code"], "nvcc").split()
    chosen = [name for name in ARCHITECTURES if f"sm_{name.rstrip('a')}" in known]
    last = chosen[-1].rstrip("a")
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in chosen]
    return [*codes, f"-gencode=arch=compute_{last},code=compute_{last}", "-DUSE_CUDA"]


def build(part: str, torch: Torch, library: Path) -> None:
    """Compile csrc/`part`, its files side by side, and replace `library` once all is done."""
    strict = os.environ.get("ALIGNVEC_WERROR") == "1"
    libraries = [f"-L{torch.folder / 'lib'}", "-ltorch_cpu"]
    if part == "cpu":
        command = [*compiler(), *FLAGS, *HOST, "-Wextra", *(["-Werror"] if strict else [])]
        command += SANITIZE if os.environ.get("ALIGNVEC_SANITIZE") == "1" else []
        libraries += ["-Wl,-z,defs"] if sys.platform == "linux" else []
    else:
        command = [str(nvcc()), *FLAGS, *device_flags(), f"-Xcompiler={','.join(HOST)}"]
        command += ["--Werror=all-warnings"] if strict else []
        libraries += ["-ltorch_cuda"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compiled(source: str) -> str:
            made = f"{folder}/{Path(source).name}.o"
            call([*command, "-isystem", str(torch.folder / "include"), "-c", source, "-o", made], source)
            return made

        objects = list(pool.map(compiled, sources(part)))
        library.parent.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(".new.so")  # renamed into place: a process that has the old one open keeps it
        call([*command, "-shared", *objects, *libraries, "-o", str(made)], "its library")
        made.replace(library)


class BuildLibraries(build_ext):
    """Builds libraries that hold operators and no Python module; torch loads them."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".abi3.so"

    def run(self) -> None:
        torch, left_out, outputs = find_torch(), [], []
        for extension in self.extensions:
            part = extension.name.rpartition("_")[2]
            library = Path(self.get_ext_fullpath(extension.name))
            try:
                reason = obstacle(part, torch)
                if torch is not None and reason is None:
                    build(part, torch, library)
                    continue
            except BuildError as error:
                reason = f"{error.args[0]} failed to compile"
                outputs.append(error.args[1])
            left_out.append(f"csrc/{part} left out: {reason}")
            library.unlink(missing_ok=True)  # one of other sources would run in its place
        report = "\n".join(["alignvec: " + "; ".join(left_out), *outputs])
        if left_out and MODE != "auto":
            raise SystemExit(f"{report}\nALIGNVEC_BUILD={MODE} asks for it.")
        if left_out:
            print(report, flush=True)


MODE = os.environ.get("ALIGNVEC_BUILD", "auto")
if MODE not in PARTS:
    raise SystemExit(f"ALIGNVEC_BUILD={MODE!r} is not one of {', '.join(PARTS)}")

if __name__ == "__main__":
    setup(
        packages=find_namespace_packages(include=["alignvec", "alignvec.*"]),
        ext_modules=[Extension(f"alignvec.compiled._{p}", sources(p), py_limited_api=True) for p in PARTS[MODE]],
        cmdclass={"build_ext": BuildLibraries},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
