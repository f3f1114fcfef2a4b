"""`alignvec.plan`: what the planner takes for each shape of layer, and why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from alignvec import formats
from alignvec.errors import AlignvecError
from alignvec.kernels import configs
from alignvec.kernels.operands import ROW, plane_width
from alignvec.planner import choice
from alignvec.planner.backends import BACKENDS, EXECUTIONS, PRECISIONS, check_choice, obstacle, resolve_backend
from alignvec.planner.cpu import cpu_capability
from alignvec.planner.devices import find
from alignvec.planner.problem import Plan, Problem

if TYPE_CHECKING:
    from alignvec.alignment import Alignment

Shape = tuple[int, int]
Layer = tuple[Shape, tuple[tuple[str, int], ...], str]  # shape, spec and bytes of each vector, dtype

# Bits of a step where lossless is left to choose: what most alignment vectors need.
LOSSLESS_BITS = 4


def plan(
    target: nn.Module | Alignment | Shape | Sequence[Shape],
    tokens: int = 1,
    rows: int | None = None,
    device: str | torch.device | None = None,
    *,
    vectors: Sequence[str] = ("dense",),
    dtype: str = "bfloat16",
    precision: str | None = None,
    execution: str | None = None,
    reuse: int = 1,
) -> list[Plan]:
    """Which execution each distinct shape of linear layer takes for `tokens` tokens; `str` of a plan is a sentence.

    Args:
        target: a model with vectors attached, its alignment, or (out_features, in_features) of one or several layers.
        rows: distinct mixes among the tokens; those that are live on the alignment, or 1.
        device: where; by default the model's, or the first GPU. "H200", say, plans for one that is not at hand.
        vectors, dtype: of layers given by their shapes: a format for each vector, and the weights' dtype.
        precision: "exact" or "merged"; the alignment's, or "exact".
        execution: force one and have its cost; the alignment's, or "auto".
        reuse: calls for which a mix does not change, over which a materialised one is paid for.

    Raises:
        AlignvecError: nothing is attached (any more), an unknown device, format or choice, numbers below 1.
    """
    for name, number in (("tokens", tokens), ("rows", 1 if rows is None else rows), ("reuse", reuse)):
        if number < 1:
            raise AlignvecError(f"{name} must be at least 1, not {number}")
    check_choice("execution", execution or "auto", EXECUTIONS)
    check_choice("precision", precision or "exact", PRECISIONS)
    alignment = _alignment(target)
    if alignment is None:
        check_choice("dtype", dtype, configs.DTYPES)
        shapes = [target] if isinstance(target, tuple) and isinstance(target[0], int) else target
        counts = Counter(_shaped(cast(Shape, tuple(shape)), vectors, dtype) for shape in cast(Sequence[Shape], shapes))
        device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    else:
        counts = Counter(_layers(alignment))
        rows = rows or _distinct(alignment)
        device = device or next(alignment.model.parameters()).device
        choices = next(iter(alignment._swaps)).aligned.edit.choices
        execution, precision = execution or choices[0], precision or choices[1]
    figures = find(str(device))
    plans = []
    for (shape, own, name), count in counts.items():
        problem = Problem(tokens, *shape, own, figures, name, min(rows or 1, tokens), precision or "exact", reuse)
        plans.append(replace(choice.plan(problem, execution or "auto"), layers=count))
    return plans


def typical(device: str | torch.device) -> str:
    """One sentence on a layer of a 7B model that decodes 16 rows with three int4 vectors."""
    return str(plan((4096, 14336), tokens=16, rows=16, device=device, vectors=("int4",) * 3)[0])


def backends() -> list[tuple[str, str]]:
    """Each backend and whether it is live here, with the reason where it is not; last what "auto" takes."""
    gpu = torch.cuda.is_available()
    said = []
    for name in BACKENDS[1:]:
        device_type = {"cpp": "cpu", "cuda": "cuda"}.get(name, "cuda" if gpu else "cpu")
        reason = obstacle(device_type, name)
        state = "live" if reason is None else f"not live: {reason}"
        said.append((name, f"{state}, runs {cpu_capability()}" if name == "cpp" and reason is None else state))
    return [*said, ("auto", "; ".join(map(_auto, ("cpu", "cuda") if gpu else ("cpu",))))]


def _auto(device_type: str) -> str:
    try:
        return f"{resolve_backend(device_type)} on {'CPUs' if device_type == 'cpu' else 'GPUs'}"
    except AlignvecError as error:  # ALIGNVEC_BACKEND names one that cannot run
        return str(error)


def table_in_use(device_name: str) -> str:
    """Which tuned table serves a GPU, and why that one."""
    tuned = configs.table(device_name)
    passed = " (that of ALIGNVEC_TUNED is for another GPU)" if os.environ.get("ALIGNVEC_TUNED") else ""
    if tuned is None:
        return f"none for this GPU{passed}: planned by its clocks and bus, until alignvec tune writes one"
    passed = "" if tuned.origin == "ALIGNVEC_TUNED" else passed
    entries = f"{len(tuned.entries)} measurements" if tuned.entries else "no measurements yet, the model alone"
    return f"{tuned.path}, {tuned.origin}{passed}: {entries}; {tuned.device.source}"


def _alignment(target: object) -> Alignment | None:
    from alignvec.alignment import Alignment

    if not isinstance(target, Alignment | nn.Module):
        return None
    found = target if isinstance(target, Alignment) else getattr(target, "alignment", None)
    if not isinstance(found, Alignment) or not found._swaps:
        raise AlignvecError("no vectors are attached to this model; attach some, or give the shapes of its layers")
    return found


def _shaped(shape: Shape, vectors: Sequence[str], dtype: str) -> Layer:
    if len(shape) != 2 or min(shape) < 1:
        raise AlignvecError(f"a layer's shape is (out_features, in_features), not {shape}")
    return shape, tuple(operand(text, shape, 4 if dtype == "float32" else 2) for text in vectors), dtype


def operand(text: str, shape: Shape, itemsize: int = 2) -> tuple[str, int]:
    """The spec of the operand that a format makes of a layer, and its bytes, as far as they follow from the shape."""
    spec = formats.parse(text)
    (out, inputs), options = shape, spec.options
    weights = out * inputs
    if spec.name in ("int8", "int4", "sign"):
        bits = {"int8": 8, "int4": 4, "sign": 1}[spec.name]
        group = int(options["group"]) or ROW
        scales = out * -(-inputs // group) * (2 if group < ROW else 4)
        return f"codes:{bits}:{plane_width(inputs, bits, group)}:{group}", weights * bits // 8 + scales
    if spec.name == "lossless":
        bits = 1 << ((int(options["width"]) or LOSSLESS_BITS) - 1).bit_length()  # kernels read powers of two
        return f"lossless:{bits}:{plane_width(inputs, bits, ROW)}:{ROW}", weights * bits // 8 + 4 * out
    if spec.name == "low-rank":
        size = 4 if options["dtype"] == "float32" else 2
        return f"low-rank:0:0:{ROW}", int(options["rank"]) * (out + inputs) * size
    if spec.name == "sparse":
        return f"sparse:0:0:{ROW}", int(weights * (float(options["density"]) * itemsize + 3 / 16)) + 4 * out
    return f"dense:0:0:{ROW}", weights * itemsize


def _layers(alignment: Alignment) -> Iterator[Layer]:
    """The linear layers of a model whose weights vectors edit."""
    for swap in alignment._swaps:
        deltas = swap.aligned.edit.deltas.get("weight")
        if deltas is not None and isinstance(swap.original, nn.Linear | Conv1D):
            weight = deltas.matrix(swap.original.weight)
            own = tuple((o.spec, sum(map(_stored, o.parts))) for o in deltas.operands)
            yield (weight.shape[0], weight.shape[1]), own, str(weight.dtype).removeprefix("torch.")


def _stored(part: torch.Tensor) -> int:
    """Bytes in memory: a vector that leaves a layer alone is one zero, expanded."""
    return min(part.nbytes, part.untyped_storage().nbytes())


def _distinct(alignment: Alignment) -> int:
    live = alignment.coefficients
    return 1 if isinstance(live, dict) else len({tuple(sorted(mix.items())) for mix in live})
