"""Tuning: which tiles run fastest on this GPU, measured and written to a table that kernels and planner read.

For each shape, format, execution and number of tokens the search starts from tiles that suit the shape and goes over
their fields one after another, keeping what is faster. A configuration counts once its result is as close to the
float64 reference as rounding leaves it. Times are CUDA-graph replays over copies of the weights that together exceed
the L2 cache several times, so that each read comes from memory.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from torch import Tensor

from alignvec import planner
from alignvec.errors import AlignvecError
from alignvec.folders import replaced, write_json
from alignvec.kernels import configs, operands, reference
from alignvec.kernels.configs import Config, Entry, Table
from alignvec.kernels.operands import Operand
from alignvec.planner.explain import operand
from alignvec.timing import Timer, copies, measure_device, random_operand, replayed

# Mistral-7B's, (out_features, in_features), q/k/v and gate/up each as one.
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
FORMATS = ("dense", "lossless", "int8", "int4", "sign", "low-rank:rank=64", "sparse")
TOKENS = (1, 16, 64, 256, 2048)
SPLIT_TOKENS, COMBINE_TOKENS = 512, 64  # most that are tuned for split, and fewest for combine


@dataclass(frozen=True)
class Case:
    """What one entry of a table is about: `vectors` vectors of one format."""

    execution: str
    precision: str
    format: str
    vectors: int
    tokens: int
    shape: tuple[int, int]
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        out, inputs = self.shape
        what = f"{self.execution} {self.precision}".removesuffix(" exact")
        return f"{out}x{inputs} {self.vectors} {self.format} {self.tokens} tokens {what}"

    @property
    def key(self) -> tuple[str | int, ...]:
        """`Entry.key` of what measuring it gives."""
        spec, _ = operand(self.format, self.shape)
        names = configs.signature((spec,) * self.vectors)
        return (self.execution, self.precision, names, self.dtype, self.tokens, *self.shape)


@dataclass(frozen=True)
class Tuned:
    """The table, how many entries were added, how many the budget left, and what could not be measured and why."""

    table: Table
    added: int
    left: int
    failed: tuple[str, ...]


def cases(
    shapes: Sequence[tuple[int, int]], formats: Sequence[str], tokens: Sequence[int], vectors: int, dtype: str
) -> list[Case]:
    """Everything there is to measure: few tokens split, many combine, and one pass that materialises."""
    made = []
    for count in sorted({configs.bucket(t) for t in tokens}):
        for shape in shapes:
            for name in (f for f in formats if dtype != "float32" or not f.startswith("lossless")):
                if count <= SPLIT_TOKENS:
                    made.append(Case("split", "exact", name, vectors, count, shape, dtype))
                for precision in configs.PRECISIONS:
                    if count >= COMBINE_TOKENS and not name.startswith("low-rank"):
                        made.append(Case("combine", precision, name, vectors, count, shape, dtype))
                    if count == 1:
                        made.append(Case("materialise", precision, name, vectors, 1, shape, dtype))
    return made


def tune(
    output: Path,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    formats: Sequence[str] = FORMATS,
    tokens: Sequence[int] = TOKENS,
    vectors: int = 3,
    dtype: str = "bfloat16",
    device: str = "cuda",
    budget: float = math.inf,
    timer: Timer | None = None,
    progress: bool = False,
) -> Tuned:
    """Measure what `output` lacks and add it there, entry by entry; stopped early, it goes on from there.

    Args:
        output: a table's JSON file, made where there is none.
        tokens: numbers of tokens, each taken up to a power of two.
        vectors: how many vectors of a format edit a layer.
        budget: seconds after which no further entry is begun.
        timer: seconds a call; CUDA-graph replays by default.

    Raises:
        AlignvecError: no GPU, a format that does not exist, an output that is no table or is another device's.
    """
    begun = time.monotonic()
    if timer is None:
        check_device(device)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    timer = timer or replayed
    todo = cases(shapes, formats, tokens, vectors, dtype)
    keys = {case: case.key for case in todo}  # refuses formats that do not exist
    if output.exists():
        table = configs.read(output)
        if not table.serves(name):
            raise AlignvecError(f"{output} is the table of {table.device.name}, not of {name}; choose another --output")
    else:
        table = Table(measure_device(name, device, timer), (name,), (), {}, output)
    done = {entry.key for entry in table.entries}
    todo = [case for case in todo if keys[case] not in done]
    added, failed = 0, []
    columns = ("{task.completed} of {task.total}", BarColumn(), TimeRemainingColumn(), "{task.description}")
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("", total=len(todo))
        for case in todo:
            if time.monotonic() - begun > budget:
                break
            bar.update(task, description=str(case))
            try:
                table = replace(table, entries=(*table.entries, measure(case, device, timer)), about=about())
            except AlignvecError as error:
                failed.append(str(error))
            else:
                added += 1
                write(table, output)
            bar.advance(task)
    planner.forget()
    return Tuned(table, added, len(todo) - added - len(failed), tuple(failed))


def check_device(device: str) -> None:
    """AlignvecError where there is nothing to measure."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise AlignvecError(f"tuning measures a GPU, and there is none here for device {device!r}")


def measure(case: Case, device: str, timer: Timer) -> Entry:
    """The entry of one case: the fastest of the configurations whose results are right."""
    shape, k = case.shape, case.vectors
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def draw() -> tuple[Tensor, list[Operand]]:
        weight = (0.02 * torch.randn(shape, generator=generator, device=device)).to(dtype)
        return weight, [random_operand(case.format, weight, generator) for _ in range(k)]

    layers = [draw()]
    nbytes = sum(o.nbytes for o in layers[0][1])
    layers += [draw() for _ in range(copies(layers[0][0].nbytes + nbytes, device) - 1)]
    x = torch.randn(case.tokens, shape[1], generator=generator, device=device).to(dtype)
    columns = torch.arange(k, dtype=torch.int32, device=device)
    table = torch.rand(1, k, generator=generator, device=device) + 0.5
    rows = torch.ones(1, dtype=torch.int32, device=device)
    if case.execution == "materialise":
        seconds, config = timer(_passes(layers, columns, table, rows, case.precision)), None
    else:
        from alignvec.kernels.linear import linear

        def call(layer: tuple[Tensor, list[Operand]], config: Config) -> Tensor:
            weight, own = layer
            tensors = (x, weight, None, own, None, columns, table, rows)
            return linear(*tensors, execution=case.execution, precision=case.precision, config=config)

        truth = reference.linear(x, layers[0][0], None, layers[0][1], None, columns, table, rows)
        bound = 3 * _error(truth.to(dtype), truth) + (1e-2 if case.precision == "merged" else 1e-5)

        def evaluate(config: Config) -> float:
            error = _error(call(layers[0], config), truth)
            if not error <= bound:
                raise ValueError(f"a relative error of {error:.1e}")
            return timer([lambda layer=layer: call(layer, config) for layer in layers])  # type: ignore[misc]

        seconds, config = search(start(case), moves(case), evaluate, str(case))
    specs = tuple(o.spec for o in layers[0][1])
    choices = (case.execution, case.precision, configs.signature(specs), case.dtype)
    return Entry(*choices, case.tokens, *shape, nbytes, seconds, config)


def search(
    first: Config, fields: dict[str, tuple[int, ...]], evaluate: Callable[[Config], float], what: str = "a layer"
) -> tuple[float, Config]:
    """Seconds and configuration of the fastest found from `first` by changing one field at a time, best value kept.

    A configuration that `evaluate` raises for (it does not compile, needs too much memory, is wrong) does not count.
    """
    best, seconds, reason = first, math.inf, ""
    tried = set()
    for name, values in fields.items():
        for value in (getattr(best, name), *values):
            candidate = replace(best, **{name: value})
            if candidate in tried:
                continue
            tried.add(candidate)
            try:
                took = evaluate(candidate)
            except AlignvecError:
                raise
            except Exception as error:  # Triton raises what its compiler, its launcher and the driver raise
                reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
                continue
            if took < seconds:
                best, seconds = candidate, took
    if seconds == math.inf:
        raise AlignvecError(f"none of {len(tried)} tile configurations runs {what} here; the last gave {reason}")
    return seconds, best


def start(case: Case) -> Config:
    """Tiles to begin with."""
    if case.execution == "combine":
        return Config(min(max(case.tokens, 16), 128), 64, 32, 8, 3)
    block_n = 64 if case.vectors == 1 else 32 if case.vectors <= 4 else 16
    programs = -(-case.shape[0] // block_n) * -(-case.tokens // 64)
    split_k = 1
    while programs * split_k < 256 and split_k < 8:
        split_k *= 2
    return Config(min(max(case.tokens, 16), 64), block_n, 64, 4, 3, split_k)


def moves(case: Case) -> dict[str, tuple[int, ...]]:
    """The values to try for each field, in the order in which they matter."""
    if case.execution == "combine":
        return {"block_n": (32, 64, 128, 256), "block_m": (64, 128), "block_k": (32, 64), **RESOURCES}
    block_m = {} if case.tokens <= 16 else {"block_m": (16, 32, 64, 128)}
    planes = case.format.split(":")[0] in ("int8", "int4", "sign", "lossless")  # a step is as wide as a plane
    block_k = {} if planes else {"block_k": (32, 64, 128, 256)}
    return {"block_n": (16, 32, 64, 128), "split_k": (1, 2, 4, 8, 16), **block_m, **block_k, **RESOURCES}


RESOURCES = {"num_warps": (2, 4, 8), "num_stages": (1, 2, 3, 4, 5)}


def write(table: Table, path: Path) -> None:
    """Beside its place, then renamed. Raises AlignvecError where it cannot be written."""
    entries = [asdict(entry) for entry in table.entries]
    data = dict(device=asdict(table.device), matches=table.matches, about=table.about, entries=entries)
    with replaced(path) as file:
        write_json(file, data, indent=1)


def about() -> dict[str, str]:
    """Versions and date."""
    found = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "torch": torch.__version__}
    for package in ("alignvec", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    runtime = torch.version.cuda or torch.version.hip
    return found | ({"runtime": runtime} if runtime else {})


def _passes(
    layers: list[tuple[Tensor, list[Operand]]], columns: Tensor, table: Tensor, rows: Tensor, precision: str
) -> list[Callable[[], object]]:
    from alignvec.kernels.materialise import materialise

    weight = layers[0][0]
    out = torch.empty_like(weight)
    low = torch.empty_like(weight) if precision == "exact" and weight.dtype != torch.float32 else None

    def one(layer: tuple[Tensor, list[Operand]]) -> Callable[[], object]:
        return lambda: materialise(layer[0], layer[1], columns, table, rows, out=out, low=low)

    calls = [one(layer) for layer in layers]
    calls[0]()
    truth = layers[0][0].double()
    for column, delta in enumerate(layers[0][1]):
        truth += table[0, column].double() * operands.decode(delta, layers[0][0]).double()
    mix = out.double() + (0 if low is None else low.double())
    error = _error(mix, truth)
    if not error <= (2**-8 if low is None else 2**-15):
        raise AlignvecError(f"the materialising pass is off by {error:.1e}; this table would be of a broken kernel")
    return calls


def _error(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())
