"""What experiments share: claims, Markdown tables, and the look of the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = ("tab:red", "0.5", "tab:blue", "tab:green", "tab:orange", "tab:purple")


@dataclass(frozen=True)
class Claim:
    """A line of the honesty table. ``held``: "yes", "no", "partly" or "not tested", and why in a few words."""

    claim: str
    paper: str
    ours: str
    held: str

    def row(self) -> list[str]:
        return list(asdict(self).values())


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], text_columns: int = 1) -> str:
    """A Markdown table whose columns after the first ``text_columns`` are aligned to the right."""
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, rule, *rows)) + "\n"


def percent(share: float, low: float | None = None, high: float | None = None) -> str:
    """`62 %`, or with an interval `62 % (50 to 73)`."""
    text = f"{100 * share:.0f} %"
    return text if low is None or high is None else f"{text} ({100 * low:.0f} to {100 * high:.0f})"


def panels(count: int, height: float = 3.4, width: float = 3.6) -> tuple[Figure, list[Any]]:
    """A figure with panels side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def save(figure: Figure, picture: Path) -> str:
    """Write the figure; the Markdown that shows it, from a page in the same folder."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    return f"![{picture.stem}]({picture.name})\n"
