"""What the commands print: text as it is, without markup, and nothing that a terminal would act on."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignvec.printable import printable

LAYOUT = "\n\t"  # what text of several lines may hold


class _Console(Console):
    """Names of tensors and answers of models may hold anything: neither markup nor escapes of a terminal."""

    def __init__(self) -> None:
        super().__init__(markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, keep=LAYOUT), **options)


console = _Console()


def answer(title: str, text: str) -> Text:
    """A bold title and a text beside it, which may have several lines."""
    return Text.assemble((printable(title), "bold"), printable(text, keep=LAYOUT))


def table(title: str, *columns: str, numeric_from: int = 1) -> Table:
    """A plain table whose columns from `numeric_from` on are numbers, right-aligned and never cut: text folds."""
    made = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        number = i >= numeric_from
        made.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return made


def size(count: float) -> str:
    """Bytes as B, KB, MB, GB (powers of 1000)."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
