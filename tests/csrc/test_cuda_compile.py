"""What nvcc makes of the CUDA kernels for GPUs that need not be there: `python -m tests.csrc.sass` shows the figures.

The budgets are those of nvcc 13.0. Registers leave room for three blocks of the kernels for 8 tokens on a
multiprocessor, and for one of those for 16, whose shared memory allows no more. Instructions are what a warp issues
for 16 outputs and 128 inputs; meanwhile, at 4.33 TB/s, an H200 reads what these need for k = 3 in 1040 issue slots of
a scheduler with signs, 1550 with int4, 2190 with 8-bit fields, and for the base alone in 880.
"""

import subprocess

import pytest

from tests.csrc import sass
from tests.csrc.emulated import TORCH

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sass.nvcc() is None, reason="nvcc is not on PATH"),
    pytest.mark.skipif(sass.disassembler() is None, reason="there is no cuobjdump, of triton or of CUDA"),
]

REGISTERS = {1: 168, 2: 232}
STAGE = 460  # of all branches, copies of words and of x for any number of tokens among them
EACH = {
    "sign": 105,
    "sign-group1": 250,
    "sign-group2": 165,
    "int4-group1": 265,
    "int4-group2": 190,
    "int8-group1": 270,
    "int8-group2": 200,
    "lossless-2bits": 200,
    "lossless-4bits": 200,
    "lossless-8bits": 200,
}


@pytest.fixture(scope="module")
def kernels():
    return sass.kernels()


def test_every_kernel_compiled_for_every_target(kernels):
    names = {"plain", *EACH}
    assert {(k.name, k.target, k.tiles) for k in kernels} == {
        (n, t, m) for n in names for t in sass.TARGETS for m in (1, 2)
    }


def test_registers_and_no_spills(kernels):
    over = [k for k in kernels if k.spills or k.registers > REGISTERS[k.tiles]]
    assert not over, over


def test_matrix_instructions_and_wide_copies(kernels):
    for k in kernels:
        assert k.opcodes["HMMA"] == sass.PIECES * k.tiles * (1 + k.vectors), k
        assert k.opcodes["LDSM"] == sass.PIECES * k.tiles // 2 + sass.PIECES, k
        assert k.wide_copies == k.opcodes["LDGSTS"] >= 16, k


def test_instructions_of_a_stage(kernels):
    """Of 8 tokens on Hopper, where the targets are; 16 have a further product for each, which costs no unpacking."""
    over = [
        k
        for k in kernels
        if k.target == "sm_90a" and k.tiles == 1 and (k.stage > STAGE or k.each > EACH.get(k.name, 0))
    ]
    assert not over, over


@pytest.mark.parametrize("file", ["bind", "grid"])
def test_host_code_compiles_against_torch(file, tmp_path):
    options = ["-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-arch=sm_90a"]
    options += ["-isystem", str(TORCH / "include"), "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror"]
    source = str(sass.SOURCES / f"{file}.cu")
    command = [sass.nvcc(), *options, "-c", source, "-o", str(tmp_path / "object.o")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
