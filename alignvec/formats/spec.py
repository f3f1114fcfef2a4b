"""What a format is asked for by (Spec), and what encoding a parameter's delta gives (Encoded)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite, prod

from torch import Tensor

Option = int | float | str
BLOCK = 1 << 17  # elements that are worked on at once: intermediates of several times their size stay in cache


@dataclass(frozen=True)
class Spec:
    """A format and all of its options, `int4:group=128` in words; `parse(str(spec)) == spec`."""

    name: str
    options: Mapping[str, Option] = field(default_factory=dict)

    def __str__(self) -> str:
        # 0 and "" stand for "automatic" wherever an option takes them.
        given = ",".join(f"{key}={value}" for key, value in self.options.items() if value not in (0, ""))
        return f"{self.name}:{given}" if given else self.name

    def __hash__(self) -> int:
        return hash((self.name, frozenset(self.options.items())))


@dataclass(frozen=True)
class Encoded:
    """One parameter's delta in a format: `shape` is the parameter's, `parts` are what a file holds."""

    name: str
    shape: tuple[int, ...]
    options: Mapping[str, Option]
    parts: Mapping[str, Tensor]

    @property
    def spec(self) -> Spec:
        return Spec(self.name, dict(self.options))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """[*, cols] as a matrix: its rows and columns; a scalar is [1, 1]."""
    return (prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def span(rows: slice | None, count: int) -> tuple[int, int]:
    """First and last (exclusive) of the matrix rows that `rows` names among `count`."""
    start, stop, _ = (rows or slice(None)).indices(count)
    return start, max(start, stop)


def blocks(rows: int, cols: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices of the rows that hold about ``size`` elements each."""
    step = max(1, size // max(cols, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass that makes no copy."""
    return not values.numel() or all(isfinite(float(end)) for end in values.aminmax())
