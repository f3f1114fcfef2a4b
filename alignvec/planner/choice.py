"""The execution that a call takes: the cheapest, or the one that was asked for, and the reason in a sentence."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alignvec.kernels import configs
from alignvec.kernels.configs import bucket
from alignvec.kernels.operands import PARTS
from alignvec.planner.cost import corrected, materialise
from alignvec.planner.devices import find
from alignvec.planner.problem import Cost, Plan, Problem, count, duration, size


def plan(problem: Problem, execution: str = "auto") -> Plan:
    """The cheapest execution of `problem`, or the one forced, for all numbers of tokens of a bucket alike.

    Cached: microseconds.
    """
    return _plan(replace(problem, tokens=bucket(problem.tokens)), execution)


@functools.lru_cache(4096)
def _plan(problem: Problem, forced: str) -> Plan:
    costs = {"split": corrected(problem, "split"), "combine": corrected(problem, "combine")}
    if problem.precision == "merged" and problem.mixes in (1, None) and forced != "split":
        del costs["split"]  # it rounds no mix
    seconds = dict.fromkeys(("split", "combine", "materialise"), math.inf)
    seconds |= {name: cost.seconds for name, cost in costs.items()}
    once = materialise(problem)
    if once is not None:
        seconds["materialise"] = once[0] / problem.reuse + once[1]
    best = min(seconds, key=lambda name: seconds[name]) if forced == "auto" else forced  # the first of equals
    clauses = [_chosen(problem, best, costs.get(best), seconds[best])]
    if forced != "auto":
        clauses[0] += ", as asked for"
    clauses += [f"{name} {cost}" for name, cost in costs.items() if name != best]
    if "split" not in costs:
        clauses.append("split rounds no mix, so it is not what a merge gives")
    if once is None and best != "materialise":
        clauses.append(f"materialise {_never(problem)}")
    elif best != "materialise":
        calls = break_even(problem)
        pays = "never pays back" if calls == math.inf else f"pays back after {count(math.ceil(calls), 'call')}"
        clauses.append(f"materialise {duration(seconds['materialise'])}, {pays} with one mix")
    return Plan(problem, best, seconds, "; ".join(clauses))


def _never(problem: Problem) -> str:
    if problem.device.name == "cpu":
        return "is a choice for the whole model on a CPU"
    return "needs one mix for all that the host knows" if problem.mixes is None else "needs one mix for all"


def _chosen(problem: Problem, execution: str, cost: Cost | None, seconds: float) -> str:
    base, vectors = size(problem.weights * problem.itemsize), size(problem.vector_bytes)
    d = problem.device
    bandwidth = (
        f"{d.read_bandwidth / 1e12:.2f} TB/s" if d.read_bandwidth > 2e11 else f"{d.read_bandwidth / 1e9:.0f} GB/s"
    )
    figures = f"base {base}, vectors {vectors} at {bandwidth}"
    if seconds == math.inf:
        return f"which {_never(problem)}"
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
    others = ("combine",) if problem.precision == "merged" else ("split", "combine")
    best = min(corrected(problem, execution).seconds for execution in others)
    return math.inf if once is None or best <= once[1] else once[0] / (best - once[1])


def choose(
    execution: str,
    x: Tensor,
    weight: Tensor,
    specs: Sequence[str],
    parts: Sequence[Tensor],
    precision: str,
) -> str:
    """What `execution="auto"` is for a call on a GPU, where mixes are on the device; every other choice stands.

    x: [..., in_features]; of [batch, tokens, in_features] there are no more mixes than the batch has sequences.
    specs, parts: of the layer's operands (`operands.parse`). On a CPU "auto" stays: `kernels.eager` reads the mixes
    themselves and decides by them. Cached by bucket of tokens, shape and formats: microseconds.
    """
    if execution != "auto" or not weight.is_cuda:
        return execution
    sizes = tuple([part.nbytes for part in parts])
    tokens, mixes = x.numel() // max(x.shape[-1], 1), x.shape[0] if x.dim() > 2 else None
    if mixes is not None and mixes > 1:  # a power of two, as tokens are: so many tokens of each
        mixes = max(bucket(tokens) // bucket(tokens // mixes), 2)
    return _choose(bucket(tokens), mixes, weight.shape, weight.dtype, tuple(specs), sizes, precision, weight.device)


@functools.lru_cache(4096)
def _choose(
    tokens: int,
    mixes: int | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    specs: tuple[str, ...],
    sizes: tuple[int, ...],
    precision: str,
    device: torch.device,
) -> str:
    vectors, position = [], 0
    for spec in specs:
        size = PARTS[spec.split(":")[0]]
        vectors.append((spec, sum(sizes[position : position + size])))
        position += size
    name = str(dtype).removeprefix("torch.")
    return plan(Problem(tokens, *shape, tuple(vectors), find(device), name, mixes, precision)).execution


def forget() -> None:
    """Read tuned tables and plan anew."""
    configs.forget()
    for cached in (_plan, _choose, find):
        cached.cache_clear()
