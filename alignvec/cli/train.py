"""`alignvec train`: preference pairs in, an alignment vector out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignvec.cli.options import model_folder
from alignvec.cli.terminal import console, size
from alignvec.errors import AlignvecError


def train(
    base: Annotated[str, typer.Argument(help="The base model: a transformers folder with its tokenizer, or a hub id.")],
    pairs: Annotated[
        Path, typer.Argument(help="JSON lines with prompt, chosen and rejected; with --prefer, a file of questions.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write the vector to.")],
    prefer: Annotated[
        list[str] | None,
        typer.Option(help="DOMAIN=LEVEL: over all others; DOMAIN=LEVEL>LEVEL,LEVEL>LEVEL: in turn. Repeatable."),
    ] = None,
    method: Annotated[str, typer.Option(help="full, or lora: a low-rank vector.")] = "full",
    rank: Annotated[int, typer.Option(help="Of the LoRA.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="Of the LoRA; default: twice the rank.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Module for the LoRA; repeatable. Default: all.")] = None,
    frozen: Annotated[
        list[str] | None, typer.Option(help="With full: pattern of parameters to leave, or none. Default: embedding.")
    ] = None,
    keep: Annotated[float, typer.Option(help="How far to go from the base to where the run ends.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Of the optimiser; default: as many as the epochs take.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the pairs.")] = 1.0,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 1e-6, with lora 1e-5.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pairs at a time.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    beta: Annotated[float, typer.Option(help="Of DPO: how strongly the base holds.")] = 0.1,
    sft_weight: Annotated[float, typer.Option(help="Of a supervised loss on the chosen responses.")] = 0.0,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a prompt and response; default: all.")] = None,
    precision: Annotated[str, typer.Option(help="auto, float32, mixed or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of order and initialisation.")] = 0,
    format: Annotated[str | None, typer.Option(help="Write the vector as int4, sign, auto:0.25, ...")] = None,
    work_folder: Annotated[
        Path | None, typer.Option(help="Keeps checkpoints; the same command goes on from the last one.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
) -> None:
    """Train with DPO, all weights or a LoRA, and write what changed as an alignment vector.

    Example: alignvec train base/ pairs.jsonl medical-av --method lora --steps 500
    """
    from alignvec.convert import convert
    from alignvec.encoding import asked_for
    from alignvec.evaluate import load_questions
    from alignvec.folders import output_folder
    from alignvec.loading import load_tokenizer
    from alignvec.train import load_pairs, pairs_from_questions, train_dpo
    from alignvec.vector import AlignmentVector

    if format is not None:
        asked_for(format)
    wanted = preferences(prefer or [])
    chosen = pairs_from_questions(load_questions(pairs), wanted) if wanted else load_pairs(pairs)
    model = model_folder(base)
    if work_folder is not None:
        places = Path(output).resolve(), work_folder.resolve()
        if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
            raise AlignvecError(
                f"--work-folder {work_folder} and the output {output} lie in each other: choose two folders"
            )
    with output_folder(output, overwrite=overwrite, inputs=[model]) as folder:  # refused before training, not after
        vector = train_dpo(
            model,
            load_tokenizer(model),
            chosen,
            method=method,
            rank=rank,
            alpha=alpha,
            targets=target or "all-linear",
            frozen=[] if frozen == ["none"] else frozen or ["embedding"],
            keep=keep,
            steps=steps,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            beta=beta,
            sft_weight=sft_weight,
            max_length=max_length,
            precision=precision,
            device=device,
            seed=seed,
            work_folder=work_folder,
            progress=True,
        )
        if format is None:
            vector.save(folder, overwrite=True)
        else:
            convert(vector, folder, format, base=model, overwrite=True)
    written = AlignmentVector.load(output)
    console.print(
        f"{output}: {len(written)} tensors, {written.format}, {size(written.nbytes)}, norm {vector.norm():.4g}"
    )


def preferences(values: list[str]) -> dict[str, str | list[tuple[str, str]]]:
    """`["medical=expert", "legal=generic>expert"]` as what `pairs_from_questions` takes."""
    wanted: dict[str, str | list[tuple[str, str]]] = {}
    for value in values:
        domain, _, levels = value.partition("=")
        if not domain or not levels or domain in wanted:
            raise AlignvecError(f"--prefer takes DOMAIN=LEVEL or DOMAIN=LEVEL>LEVEL, each domain once, not {value!r}")
        if ">" not in levels:
            wanted[domain] = levels
            continue
        pairs = [tuple(part.strip() for part in pair.split(">")) for pair in levels.split(",")]
        if not all(len(pair) == 2 and all(pair) for pair in pairs):
            raise AlignvecError(f"--prefer takes pairs such as expert>generic, joined by commas, not {value!r}")
        wanted[domain] = [(pair[0], pair[1]) for pair in pairs]
    return wanted
