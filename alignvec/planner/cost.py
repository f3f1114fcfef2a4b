"""What an execution of a layer costs, by the figures of a device: bytes over bandwidth or FLOPs over rate, the larger.

    split        every tile of tokens reads base and vectors; a product for the base and one for each vector
    combine      the same reads, shared by neighbouring tiles; the mix formed anew in each; one product, two when exact.
                 A tile whose tokens have several mixes is computed once for each
    materialise  one pass reads base and vectors and writes the mix, twice when exact; then the vendor's product of
                 each half. Only for one mix that the host knows, over the calls in which it does not change

A tuned table corrects the model: by measured over modelled seconds where it has the layer's formats, and it says
nothing where it has not. Tokens are counted in powers of two, so all of a bucket have one plan.
"""

from __future__ import annotations

import math
from dataclasses import replace

from alignvec.kernels import configs
from alignvec.kernels.configs import Entry
from alignvec.planner import cpu
from alignvec.planner.cpu import BATCH
from alignvec.planner.problem import Cost, Problem

# Tokens that read the weights together: a tile, and in combine the tiles that run through one stretch of weights.
TILE, GROUP = 128, 1024

# Instructions that make one delta of a stored one, each time a tile reads it; the mix takes MIX more, a pair PAIR.
UNPACK = {"dense": 0, "codes": 4, "lossless": 8, "sparse": 16, "low-rank": 0}
MIX, PAIR = 2, 8


def materialise(problem: Problem) -> tuple[float, float] | None:
    """Seconds of the pass and of a call afterwards; None where tokens have several mixes, or unknown ones."""
    p, d = problem, problem.device
    if p.mixes != 1 or d.name == "cpu":
        return None
    base, halves = p.weights * p.itemsize, 2 if p.pair else 1
    rank = p.low_rank / (p.out_features + p.in_features)  # the sum of all ranks
    reads = (base * (1 + halves) + p.vector_bytes) / d.read_bandwidth
    unpack = 2 * p.weights * (sum(UNPACK[kind] + MIX for kind in p.kinds) + PAIR * (halves - 1)) / d.vector_32
    once = d.launch + max(reads, unpack, 2 * rank * p.weights / _matrix(p))
    values = p.tokens * (p.out_features + p.in_features)
    read = (base + values * p.itemsize) / (d.read_bandwidth * d.vendor_bandwidth)
    rate = d.matrix_16 if p.itemsize == 2 else d.matrix_32
    call = d.launch + max(read, 2 * p.tokens * p.weights / rate)
    return once * _correction(p, "materialise"), halves * call


def model(problem: Problem, execution: str) -> Cost:
    """The cost of split, combine, or a materialising pass by the figures of the device alone."""
    if execution == "materialise":
        once = materialise(replace(problem, mixes=1))
        return Cost(math.inf if once is None else once[0], "bytes")
    if problem.device.name == "cpu":
        return cpu.cost(problem, execution)
    p, d, full = problem, problem.device, len(problem.kinds)
    tiles = math.ceil(p.tokens / TILE)
    passes = 1.0 if execution == "split" else 1 + _boundaries(p) / tiles
    stretches = tiles if execution == "split" else passes * math.ceil(p.tokens / GROUP)
    values = p.tokens * (p.out_features + passes * p.in_features)
    products = 1 + full if execution == "split" else passes * (2 if p.pair else 1)
    per_weight = passes * sum(UNPACK[kind] for kind in p.kinds)
    if execution == "combine":
        per_weight += passes * (MIX * full + (PAIR if p.pair else 0))
    seconds = {
        "bytes": (stretches * (p.weights * p.itemsize + p.vector_bytes) + values * p.itemsize) / d.read_bandwidth,
        "FLOPs": 2 * p.tokens * (products * p.weights + p.low_rank) / _matrix(p),
        "unpacking": 2 * tiles * p.weights * per_weight / d.vector_32,
    }
    limit = max(seconds, key=lambda name: seconds[name])
    note = ""
    if passes > 1:
        note = f", as its tiles of {TILE} tokens have {passes:.3g} mixes each"
    launches = d.launch * (2 if p.low_rank else 1)
    return Cost(launches + seconds[limit], limit if seconds[limit] > launches else "launches", note)


def _matrix(p: Problem) -> float:
    return (p.device.matrix_16 if p.itemsize == 2 else p.device.matrix_32) * p.device.kernel_matrix


def _boundaries(p: Problem) -> int:
    """How often a mix ends inside one of combine's tiles of tokens."""
    mixes = p.mixes or (p.tokens if p.tokens <= BATCH else 1)
    aligned = p.tokens % mixes == 0 and p.tokens // mixes % TILE == 0
    return 0 if aligned else min(mixes, p.tokens) - 1


def corrected(problem: Problem, execution: str) -> Cost:
    """`model`, by what the device's tuned table says of it."""
    cost = model(problem, execution)
    factor = _correction(problem, execution)
    note = cost.note if factor == 1 else f"{cost.note}, {factor:.2f} times the model's as measured"
    return Cost(cost.seconds * factor, cost.limit, note)


def _correction(problem: Problem, execution: str) -> float:
    """Measured over modelled seconds at the tokens of `problem`, 1 where the device's table has no such formats.

    Entries of the layer's own shape count, or those of all shapes; between two numbers of tokens it is interpolated,
    both in logarithms, and beyond the last it stays.
    """
    tuned = configs.table(problem.device.name)
    if tuned is None or not tuned.entries:
        return 1.0
    precision = "exact" if execution == "split" else problem.precision
    names = (execution, precision, configs.signature(tuple(spec for spec, _ in problem.vectors)), problem.dtype)
    entries = [e for e in tuned.entries if (e.execution, e.precision, e.vectors, e.dtype) == names]
    shape = (problem.out_features, problem.in_features)
    entries = [e for e in entries if (e.out_features, e.in_features) == shape] or entries
    logs: dict[int, list[float]] = {}
    for e in entries:
        logs.setdefault(e.tokens, []).append(math.log(e.seconds / _modelled(problem, e)))
    points = sorted((math.log2(tokens), sum(values) / len(values)) for tokens, values in logs.items())
    return math.exp(_interpolate(points, math.log2(problem.tokens))) if points else 1.0


def _modelled(problem: Problem, entry: Entry) -> float:
    """What the model alone says of an entry with the formats of `problem`."""
    scale = entry.vector_bytes / max(problem.vector_bytes, 1)
    vectors = tuple((spec, round(nbytes * scale)) for spec, nbytes in problem.vectors)
    device = replace(problem.device, name="")  # no table, no correction
    shape = (entry.tokens, entry.out_features, entry.in_features)
    return model(Problem(*shape, vectors, device, problem.dtype, 1, problem.precision), entry.execution).seconds


def _interpolate(points: list[tuple[float, float]], at: float) -> float:
    below = max((p for p in points if p[0] <= at), default=points[0])
    above = min((p for p in points if p[0] >= at), default=points[-1])
    if above[0] == below[0]:
        return below[1]
    return below[1] + (above[1] - below[1]) * (at - below[0]) / (above[0] - below[0])
