"""What the device of a call can do: from its tuned table, or from what the driver says of it."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch

from alignvec.errors import AlignvecError
from alignvec.kernels import configs
from alignvec.kernels.configs import Device
from alignvec.planner import cpu

T = TypeVar("T", int, float)

# FLOP a cycle and multiprocessor with 16-bit inputs, by compute capability; others are taken for the nearest below.
TENSOR_CORES = {(7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 1024, (9, 0): 4096, (10, 0): 8192, (12, 0): 2048}
CUDA_CORES = {(7, 0): 128, (8, 0): 128, (8, 6): 256, (9, 0): 256}
BANDWIDTH = {(7, 0): 5e11, (8, 0): 1.5e12, (8, 6): 7e11, (9, 0): 3.3e12, (10, 0): 7e12, (12, 0): 1e12}

# Of a data sheet's figures, what programs see; an H200 reads 0.90 of its own and multiplies 0.70.
READ_SHARE, MATRIX_SHARE, VECTOR_SHARE = 0.85, 0.65, 0.75


@functools.lru_cache(64)
def find(device: str | torch.device) -> Device:
    """The figures of a device: `cuda:0`, `cpu`, or a GPU that alignvec has a table for, by (part of) its name.

    Raises:
        AlignvecError: no such device.
    """
    name = str(device)
    if name == "cpu":
        return cpu.device(torch.get_num_threads())
    if name.split(":")[0] == "cuda":
        if not torch.cuda.is_available():
            raise AlignvecError(f"there is no device {name!r} here; name one to plan for, such as 'H200'")
        try:
            properties = torch.cuda.get_device_properties(device)
        except (AssertionError, RuntimeError):
            raise AlignvecError(f"there is no device {name!r}, only {torch.cuda.device_count()} of them") from None
        tuned = configs.table(properties.name)
        return tuned.device if tuned else generic(properties)
    known = configs.packaged()
    wanted = name.lower()
    for tuned in known:
        if wanted in tuned.device.name.lower():
            return tuned.device
    names = ", ".join(repr(tuned.device.name) for tuned in known)
    raise AlignvecError(f"device {name!r} is not known: it is 'cpu', 'cuda:0' and so on, or (part of) one of {names}")


def generic(properties: Any) -> Device:
    """A GPU without a table, from its clocks, bus and compute capability (`torch.cuda.get_device_properties`)."""
    capability = (properties.major, properties.minor)
    clock = 1e3 * (getattr(properties, "clock_rate", 0) or 1_500_000)  # kHz
    lines, rate = getattr(properties, "memory_bus_width", 0), getattr(properties, "memory_clock_rate", 0)
    bandwidth = lines / 8 * 2e3 * rate or _at_or_below(BANDWIDTH, capability)  # some drivers do not tell
    amd = getattr(properties, "gcnArchName", "").startswith("gfx")
    units = properties.multi_processor_count
    tensor = 2048 if amd else _at_or_below(TENSOR_CORES, capability)
    vector = 256 if amd else _at_or_below(CUDA_CORES, capability)
    return Device(
        properties.name,
        read_bandwidth=READ_SHARE * bandwidth,
        matrix_16=MATRIX_SHARE * units * clock * tensor,
        matrix_32=VECTOR_SHARE * units * clock * vector,
        vector_32=units * clock * vector,
        launch=3e-6,
        vendor_bandwidth=0.9,
        kernel_matrix=0.6,
        multiprocessors=units,
        source="estimated from clocks, bus and compute capability; alignvec tune measures it",
    )


def _at_or_below(rates: dict[tuple[int, int], T], capability: tuple[int, int]) -> T:
    return rates[max((c for c in rates if c <= capability), default=min(rates))]
