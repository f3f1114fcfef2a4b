"""Measuring kernels on a GPU: seconds of calls whose weights come from memory, and random deltas of any format."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alignvec import formats, planner
from alignvec.kernels import operands
from alignvec.kernels.configs import Device
from alignvec.kernels.operands import Operand
from alignvec.planner.explain import operand

Timer = Callable[[Sequence[Callable[[], object]]], float]  # seconds of one call, on average over calls in a row


def replayed(calls: Sequence[Callable[[], object]], repeats: int = 15) -> float:
    """Seconds a call, the median over replays of a CUDA graph that holds them all."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    samples = []
    for _ in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(1e-3 * begin.elapsed_time(end) / len(calls))
    return statistics.median(samples[3:])


def measure_device(name: str, device: str, timer: Timer, size: int = 1 << 32) -> Device:
    """The figures of a device: of its table or its clocks, but bandwidth and matrix rate measured, on `size` bytes."""
    known = planner.find(device)
    values = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
    side = min(8192, math.isqrt(size // 8))
    a, b = (torch.ones(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    read = 2 * values.numel() / timer([lambda: values.view(-1, 128).amax(0)])
    matrix = 2 * side**3 / timer([lambda: a @ b])
    source = f"reads and 16-bit products measured; others: {known.source}"
    return replace(known, name=name, read_bandwidth=read, matrix_16=matrix, source=source[:1000])


def random_operand(text: str, weight: Tensor, generator: torch.Generator) -> Operand:
    """A delta [out, in] in a format, of random codes: a real one's bytes and work. Lossless: 1 in 4096 lies aside."""
    spec, _ = operand(text, (weight.shape[0], weight.shape[1]), weight.element_size())
    kind, bits, _, group = spec.split(":")
    (out, inputs), device = weight.shape, weight.device

    def draw(*size: int, dtype: torch.dtype = weight.dtype) -> Tensor:
        return (1e-3 * torch.randn(*size, generator=generator, device=device)).to(dtype)

    if kind == "dense":
        return operands.dense(draw(out, inputs))
    if kind == "low-rank":
        rank = int(formats.parse(text).options["rank"])
        return operands.low_rank(draw(rank, inputs), draw(out, rank))
    if kind == "sparse":
        density = float(formats.parse(text).options["density"])
        mask = torch.rand(out, inputs, generator=generator, device=device) < density
        return operands.from_mask(mask, draw(int(mask.sum())))
    fields = torch.randint(1 << int(bits), (out, inputs), generator=generator, device=device, dtype=torch.uint8)
    if kind == "lossless":
        aside = torch.rand(out, inputs, generator=generator, device=device) < 2**-12
        fields = fields.clamp_(min=1).masked_fill_(aside, 0)
        index = aside.flatten().nonzero().flatten()
        return operands.from_steps(fields, int(bits), index, draw(len(index), dtype=torch.bfloat16))
    width = min(int(group), inputs)
    scales = draw(out, -(-inputs // width), dtype=torch.bfloat16 if int(group) < operands.ROW else torch.float32)
    return operands.from_fields(fields, scales, int(bits), int(group) if int(group) < operands.ROW else 0)


def copies(nbytes: int, device: str) -> int:
    """Layers that together exceed the L2 cache four times."""
    if not device.startswith("cuda"):
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    return max(2, math.ceil(4 * cache / nbytes))
