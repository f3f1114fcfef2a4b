"""One call of a linear layer, and the plan for it, as plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from alignvec.kernels import configs
from alignvec.kernels.configs import Device


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
    """Seconds of one call, and what bounds them: "bytes", "FLOPs", "unpacking" or "launches"."""

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
        vectors = ", ".join(f"{count(n, 'vector')} {name}" for name, n in formats.items()) or "no vectors"
        mixes = "mixes known on the device alone" if p.mixes is None else count(p.mixes, "mix")
        layers = f"{self.layers} layers of " if self.layers > 1 else ""
        shape = f"{p.out_features}x{p.in_features}"
        return f"{layers}{shape}, {vectors}, {count(p.tokens, 'token')}, {mixes}: {self.execution}, {self.reason}"


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


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}{'es' if noun.endswith('x') else 's'}"
