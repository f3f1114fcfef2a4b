"""What each execution of a layer costs, and which is cheapest: bytes over bandwidth or FLOPs over rate, the larger.

    split        every tile of tokens reads base and vectors; a product for the base and one for each vector
    combine      the same reads, shared by neighbouring tiles; the mix formed anew in each; one product, two when exact.
                 A tile whose tokens have several mixes splits
    materialise  one pass reads base and vectors and writes the mix, twice when exact; then the vendor's product of
                 each half. Only for one mix that the host knows, over the calls in which it does not change

A tuned table corrects the model: by measured over modelled seconds where it has the layer's formats, and it says
nothing where it has not. Tokens are counted in powers of two, so all of a bucket have one plan.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignvec.kernels import configs
from alignvec.kernels.configs import Device, Entry, bucket
from alignvec.planner.devices import find

# Tokens that read the weights together: a tile, and in combine the tiles that run through one stretch of weights.
TILE, GROUP = 128, 1024

# Rows of a batch that decodes: up to here tokens whose mixes the host does not know may each have their own.
BATCH = 256

# Instructions that make one delta of a stored one, each time a tile reads it; the mix takes MIX more, a pair PAIR.
UNPACK = {"dense": 0, "codes": 4, "lossless": 8, "sparse": 16, "low-rank": 0}
MIX, PAIR = 2, 8


@dataclass(frozen=True)
class Problem:
    """One call of a linear layer.

    vectors: an operand's `spec` and `nbytes` for each. dtype: of the weight, as text. mixes: how many distinct mixes
    the tokens have, in equal stretches; None where only the device knows. reuse: calls that a materialised mix serves.
    """

    tokens: int
    out_features: int
    in_features: int
    vectors: tuple[tuple[str, int], ...]
    device: Device
    dtype: str = "bfloat16"
    mixes: int | None = 1
    precision: str = "exact"
    reuse: int = 1

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def vector_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self.vectors)

    @property
    def kinds(self) -> list[str]:
        """The kind of each vector that is a matrix; low-rank ones are not."""
        return [kind for kind in (spec.split(":")[0] for spec, _ in self.vectors) if kind != "low-rank"]

    @property
    def low_rank(self) -> int:
        """Values in the factors of the low-rank vectors."""
        return sum(nbytes for spec, nbytes in self.vectors if spec.startswith("low-rank")) // self.itemsize

    @property
    def pair(self) -> bool:
        """Whether a mix takes two numbers of the weight's dtype to hold."""
        return self.precision == "exact" and self.itemsize == 2


@dataclass(frozen=True)
class Cost:
    """Seconds of one call, and what bounds them: "bytes", "FLOPs" or "unpacking"."""

    seconds: float
    limit: str
    note: str = ""

    def __str__(self) -> str:
        return f"{duration(self.seconds)} by {self.limit}{self.note}"


@dataclass(frozen=True)
class Plan:
    """The execution chosen, the seconds of each (infinite for one that cannot be), and why, in a sentence."""

    problem: Problem
    execution: str
    seconds: dict[str, float]
    reason: str
    layers: int = 1

    def __str__(self) -> str:
        p = self.problem
        formats = Counter(configs.describe(spec) for spec, _ in p.vectors)
        vectors = ", ".join(f"{_count(n, 'vector')} {name}" for name, n in formats.items()) or "no vectors"
        mixes = "mixes known on the device alone" if p.mixes is None else _count(p.mixes, "mix")
        layers = f"{self.layers} layers of " if self.layers > 1 else ""
        shape = f"{p.out_features}x{p.in_features}"
        return f"{layers}{shape}, {vectors}, {_count(p.tokens, 'token')}, {mixes}: {self.execution}, {self.reason}"


def plan(problem: Problem) -> Plan:
    """The cheapest execution of `problem`, for all numbers of tokens of its bucket alike. Cached: microseconds."""
    return _plan(replace(problem, tokens=bucket(problem.tokens)))


@functools.lru_cache(4096)
def _plan(problem: Problem) -> Plan:
    costs = {"split": _cost(problem, "split"), "combine": _cost(problem, "combine")}
    seconds = {name: cost.seconds for name, cost in costs.items()}
    once = materialise(problem)
    seconds["materialise"] = math.inf if once is None else once[0] / problem.reuse + once[1]
    best = min(seconds, key=lambda name: seconds[name])  # the first of equals
    clauses = [_chosen(problem, best, costs.get(best), seconds[best])]
    clauses += [f"{name} {cost}" for name, cost in costs.items() if name != best]
    if once is None:
        where = "on a CPU is a choice for the whole model" if problem.device.name == "cpu" else "needs one mix for all"
        clauses.append(f"materialise {where}{' that the host knows' if problem.mixes is None else ''}")
    elif best != "materialise":
        calls = break_even(problem)
        pays = "never pays back" if calls == math.inf else f"pays back after {_count(math.ceil(calls), 'call')}"
        clauses.append(f"materialise {duration(seconds['materialise'])}, {pays} with one mix")
    return Plan(problem, best, seconds, "; ".join(clauses))


def _chosen(problem: Problem, execution: str, cost: Cost | None, seconds: float) -> str:
    base, vectors = size(problem.weights * problem.itemsize), size(problem.vector_bytes)
    d = problem.device
    bandwidth = (
        f"{d.read_bandwidth / 1e12:.2f} TB/s" if d.read_bandwidth > 2e11 else f"{d.read_bandwidth / 1e9:.0f} GB/s"
    )
    figures = f"base {base}, vectors {vectors} at {bandwidth}"
    if cost is None:
        calls = "in this call alone" if problem.reuse == 1 else f"over {problem.reuse} calls"
        return f"{duration(seconds)} with its pass paid {calls} ({figures})"
    if cost.limit == "FLOPs":
        rate = (d.matrix_16 if problem.itemsize == 2 else d.matrix_32) * d.kernel_matrix
        figures += f", products at {rate / 1e12:.3g} TFLOP/s"
    return f"{cost} ({figures})"


def break_even(problem: Problem) -> float:
    """The calls after which materialising one mix has paid for its pass, against the better of split and combine."""
    once = materialise(replace(problem, mixes=1))
    best = min(_cost(problem, execution).seconds for execution in ("split", "combine"))
    return math.inf if once is None or best <= once[1] else once[0] / (best - once[1])


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
        return _cpu(problem, execution)
    p, d, full = problem, problem.device, len(problem.kinds)
    mixed = 1.0 if execution == "split" else _mixed_tiles(p)
    tiles = math.ceil(p.tokens / TILE)
    stretches = mixed * tiles + (1 - mixed) * math.ceil(p.tokens / GROUP)
    values: float = p.tokens * (p.out_features + p.in_features)
    # A tile of combine that splits reads its tokens once more for each vector.
    values += p.tokens * p.in_features * full * (mixed if execution == "combine" else 0)
    products = mixed * (1 + full) + (1 - mixed) * (2 if p.pair else 1)
    per_weight = sum(UNPACK[kind] for kind in p.kinds)
    if execution == "combine":
        per_weight += MIX * full + (PAIR if p.pair else 0)
    seconds = {
        "bytes": (stretches * (p.weights * p.itemsize + p.vector_bytes) + values * p.itemsize) / d.read_bandwidth,
        "FLOPs": 2 * p.tokens * (products * p.weights + p.low_rank) / _matrix(p),
        "unpacking": 2 * tiles * p.weights * per_weight / d.vector_32,
    }
    limit = max(seconds, key=lambda name: seconds[name])
    note = ""
    if execution == "combine" and mixed:
        note = f", as {mixed:.0%} of its tiles have several mixes" if mixed < 1 else ", as it cannot mix rows in a tile"
    launches = 2 if p.low_rank else 1
    return Cost(launches * d.launch + seconds[limit], limit, note)


def _cpu(p: Problem, execution: str) -> Cost:
    """Plain torch: nothing overlaps, 16-bit weights are raised to float32, a mix moves 12 bytes a weight and vector."""
    d, full = p.device, len(p.kinds)
    unpacked = sum(kind != "dense" for kind in p.kinds)
    matrices = 1 + full if execution == "split" else 1
    moved = p.weights * (p.itemsize + 12 * unpacked) + p.vector_bytes
    moved += p.weights * (6 * matrices if p.itemsize == 2 else 0)
    moved += 0 if execution == "split" else 12 * p.weights * full * (p.mixes or min(p.tokens, BATCH))
    terms = {
        "bytes": moved / d.read_bandwidth,
        "FLOPs": 2 * p.tokens * (matrices * p.weights + p.low_rank) / d.matrix_32,
    }
    return Cost(matrices * d.launch + sum(terms.values()), max(terms, key=lambda name: terms[name]))


def _matrix(p: Problem) -> float:
    return (p.device.matrix_16 if p.itemsize == 2 else p.device.matrix_32) * p.device.kernel_matrix


def _mixed_tiles(p: Problem) -> float:
    """The share of combine's tiles whose tokens have several mixes."""
    mixes = p.mixes or (p.tokens if p.tokens <= BATCH else 1)
    tiles = math.ceil(p.tokens / TILE)
    if mixes == 1 or (p.tokens % mixes == 0 and p.tokens // mixes % TILE == 0):
        return 0.0
    return min(1.0, (mixes - 1) / tiles)


def _cost(problem: Problem, execution: str) -> Cost:
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


def choose(
    execution: str, tokens: int, weight: Tensor, specs: Sequence[str], parts: Sequence[Tensor], precision: str
) -> str:
    """What `execution="auto"` is for a call on a GPU, where mixes are on the device; every other choice stands.

    specs, parts: of the layer's operands (`operands.parse`). On a CPU "auto" stays: `kernels.eager` reads the mixes
    themselves and decides by them. Cached by bucket of tokens, shape and formats: microseconds.
    """
    if execution != "auto" or not weight.is_cuda:
        return execution
    sizes = tuple([part.nbytes for part in parts])
    return _choose(bucket(tokens), weight.shape, weight.dtype, tuple(specs), sizes, precision, weight.device)


@functools.lru_cache(4096)
def _choose(
    tokens: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    specs: tuple[str, ...],
    sizes: tuple[int, ...],
    precision: str,
    device: torch.device,
) -> str:
    from alignvec.kernels.operands import PARTS

    vectors, position = [], 0
    for spec in specs:
        count = PARTS[spec.split(":")[0]]
        vectors.append((spec, sum(sizes[position : position + count])))
        position += count
    name = str(dtype).removeprefix("torch.")
    return plan(Problem(tokens, *shape, tuple(vectors), find(device), name, None, precision)).execution


def forget() -> None:
    """Read tuned tables and plan anew."""
    configs.forget()
    for cached in (_plan, _choose, find):
        cached.cache_clear()


def duration(seconds: float) -> str:
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 1000:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def size(nbytes: float) -> str:
    for unit, scale in (("B", 1), ("KB", 1e3), ("MB", 1e6)):
        if nbytes / scale < 1000:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes / 1e9:.3g} GB"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}{'es' if noun.endswith('x') else 's'}"
