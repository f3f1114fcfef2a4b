"""Values that several commands take: NAME=PATH, NAME=NUMBER, and tables on the console."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from alignvec.errors import AlignvecError

console = Console(markup=False)  # names of tensors and answers of models are shown as they are

DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.", show_default=False)
]


def pairs(option: str, values: list[str]) -> dict[str, str]:
    """`["medical=av"]` as `{"medical": "av"}`.

    Raises:
        AlignvecError: a value without `=`, or a name given twice.
    """
    result: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not (name and equals and rest):
            raise AlignvecError(f"{option} takes NAME=VALUE, not {value!r}")
        if name in result:
            raise AlignvecError(f"{option} names {name!r} twice")
        result[name] = rest
    return result


def vectors(values: list[str]) -> dict[str, Path]:
    """`--vector medical=folder` options; a folder alone goes by its own name."""
    return {
        n: Path(p) for n, p in pairs("--vector", [v if "=" in v else f"{Path(v).name}={v}" for v in values]).items()
    }


def mix(option: str, values: list[str]) -> dict[str, float]:
    """`["medical=0.7", "legal=-0.3"]`, or the same joined by commas, as coefficients by name."""
    parsed = pairs(option, [part.strip() for value in values for part in value.split(",") if part.strip()])
    try:
        return {name: float(number) for name, number in parsed.items()}
    except ValueError:
        raise AlignvecError(f"{option} takes NAME=NUMBER, not {', '.join(values)!r}") from None


def model_folder(given: str) -> Path:
    """The folder of a model; a hub id that is no local path is downloaded to the hub's cache first.

    Raises:
        AlignvecError: there is no such folder, nor a model that the hub could give.
    """
    from alignvec.sources import local_path

    folder = local_path(given)
    if not folder.is_dir():
        raise AlignvecError(f"{given} is no folder with a model")
    return folder


def device_or_default(device: str | None) -> str:
    """What --device says; without it the GPU, if there is one."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


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
