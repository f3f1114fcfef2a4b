"""Values that several commands take: NAME=PATH, NAME=NUMBER, models and devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignvec.errors import AlignvecError

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
    """What --device says; without it the GPU, if there is one.

    Raises:
        AlignvecError: no such device is at hand.
    """
    import torch

    try:
        found = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError):  # an unknown name, a build without CUDA, no driver, too high a number
        raise AlignvecError(f"--device {device} is not at hand: choose cpu, or cuda on a machine with a GPU") from None
    if found.type == "meta":
        raise AlignvecError(f"--device {device} computes nothing: choose cpu or cuda")
    return str(found)
