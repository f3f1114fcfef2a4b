"""`alignvec tune`: measure tiles on this GPU and write the table that kernels and planner read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from alignvec.cli.terminal import console
from alignvec.errors import AlignvecError


def tune(
    shape: Annotated[
        list[str] | None, typer.Option(help="OUTxIN of a layer; repeatable. Default: Mistral-7B's.")
    ] = None,
    format: Annotated[list[str] | None, typer.Option(help="Of the vectors; repeatable. Default: all.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens in a call; repeatable. Default: 1 to 2048.")] = None,
    vectors: Annotated[int, typer.Option(min=1, max=16, help="Vectors on a layer.")] = 3,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ...")] = "cuda",
    budget: Annotated[float, typer.Option(min=0, help="Seconds to stop after; the next run goes on.")] = math.inf,
    output: Annotated[
        Path | None, typer.Option(help="The table. Default: in the user's cache, where it is found by itself.")
    ] = None,
) -> None:
    """Find the fastest tiles for this GPU and write them to a table; what the table has already is not done again.

    Another table than the cache's is used where ALIGNVEC_TUNED names it.

    Example: alignvec tune --format int4 --tokens 1 --tokens 16 --budget 600
    """
    import torch

    from alignvec import tune as tuning
    from alignvec.kernels import configs
    from alignvec.planner import check_choice

    check_choice("--dtype", dtype, configs.DTYPES)
    if any(count < 1 for count in tokens or ()):
        raise AlignvecError("--tokens must be at least 1")
    shapes = [_shape(text) for text in shape] if shape else tuning.SHAPES
    if output is None:
        tuning.check_device(device)
        output = configs.user_folder() / configs.file_name(torch.cuda.get_device_name(device))
    tuned = tuning.tune(
        output,
        shapes=shapes,
        formats=format or tuning.FORMATS,
        tokens=tokens or tuning.TOKENS,
        vectors=vectors,
        dtype=dtype,
        device=device,
        budget=budget,
        progress=True,
    )
    for reason in tuned.failed:
        console.print(f"not measured: {reason}")
    left = f", {tuned.left} left for another run" if tuned.left else ""
    console.print(f"{output}: {tuned.added} measurements added{left}")


def _shape(text: str) -> tuple[int, int]:
    out, cross, inputs = text.partition("x")
    if not (cross and out.isdigit() and inputs.isdigit() and int(out) and int(inputs)):
        raise AlignvecError(f"--shape takes OUTxIN, such as 4096x14336, not {text!r}")
    return int(out), int(inputs)
