"""What a section measured, as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.record import Row

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))


def report(console: Console, title: str, rows: Sequence[Row]) -> None:
    """A line for each row: median, p20 and p80, target and verdict, or why it is missing."""
    table = Table("", "", "median", "p20", "p80", "target", "", title=title)
    for column in table.columns[2:6]:
        column.justify = "right"
    for row in rows:
        parameters = ", ".join(f"{key} {value}" for key, value in row["parameters"].items())
        if row["missing"]:
            table.add_row(row["name"], parameters, "", "", "", "", row["missing"])
            continue
        values = [shown(row[key], row["unit"]) for key in ("median", "p20", "p80")]
        table.add_row(row["name"], parameters, *values, *verdict(row))
    console.print(table)


def shown(value: float, unit: str) -> str:
    """A value in its unit, with a prefix: `12.3 ms`; ratios as they are."""
    if unit == "x":
        return f"{value:,.0f} x" if value >= 1000 else f"{value:.3g} x"
    scale, prefix = next((pair for pair in PREFIXES if abs(value) >= pair[0]), (1.0, ""))
    return f"{value / scale:.3g} {prefix}{unit}"


def verdict(row: Row) -> tuple[str, str]:
    """The target of a row, and whether it is met; nothing where it has none."""
    if row["target"] is None:
        return "", ""
    lower = row["better"] == "lower"
    met = row["median"] <= row["target"] if lower else row["median"] >= row["target"]
    return f"{'<=' if lower else '>='} {shown(row['target'], row['unit'])}", "met" if met else "missed"
