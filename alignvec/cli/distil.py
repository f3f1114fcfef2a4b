"""`alignvec distil`: train the scales of a low-bit vector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alignvec.cli.options import DeviceOption, model_folder
from alignvec.cli.terminal import console, size


def distil(
    base: Annotated[str, typer.Argument(help="The base model: a transformers folder with its tokenizer, or a hub id.")],
    aligned: Annotated[
        str, typer.Argument(help="What to match: a dense or lossless vector, or the aligned model (a hub id, too).")
    ],
    vector: Annotated[Path, typer.Argument(help="The low-bit vector: sign, int4 or int8.")],
    calibration: Annotated[Path, typer.Argument(help='JSON lines with "text", or questions.')],
    output: Annotated[Path, typer.Argument(help="Folder to write the vector with its new scales to.")],
    steps: Annotated[int, typer.Option(help="Of the optimiser.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Texts a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Of factors that the scales are multiplied by.")] = 5e-2,
    max_length: Annotated[int, typer.Option(help="Tokens of a text that are read.")] = 128,
    dtype: Annotated[str, typer.Option(help="To compute in: float32, bfloat16 or float16.")] = "float32",
    device: DeviceOption = None,
    seed: Annotated[int, typer.Option(help="Of the order of the texts.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
) -> None:
    """Train the scales of a low-bit vector until the model answers as with the dense one (BitDelta).

    Example: alignvec distil base/ medical-av medical-sign texts.jsonl medical-sign-distilled
    """
    from alignvec.folders import output_folder
    from alignvec.loading import load_tokenizer
    from alignvec.sources import local_path
    from alignvec.train import distil as train_scales

    model, target = model_folder(base), local_path(aligned)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with output_folder(output, overwrite=overwrite, inputs=[model, target, vector]) as folder:
        with Progress(*columns) as progress:
            task = progress.add_task("distilling", total=steps)
            losses: list[float] = []

            def show(step: int, loss: float) -> None:
                losses.append(loss)
                recent = losses[-10:]
                note = f"distilling, divergence {sum(recent) / len(recent):.4f}"
                progress.update(task, completed=step, description=note)

            made = train_scales(
                model,
                target,
                vector,
                load_tokenizer(model),
                calibration,
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                max_length=max_length,
                dtype=dtype,
                device=device,
                seed=seed,
                progress=show,
            )
        made.save(folder, overwrite=True)
    first, last = losses[:10], losses[-10:]
    console.print(
        f"{output}: {made.format}, {size(made.nbytes)}, divergence {sum(first) / len(first):.4f} "
        f"to {sum(last) / len(last):.4f} nats a token"
    )
