"""`alignvec generate`: text from a model with vectors attached, one row per mix."""

from __future__ import annotations

from typing import Annotated

import typer

from alignvec.cli.options import DeviceOption, device_or_default, mix, model_folder, vectors
from alignvec.cli.terminal import answer, console
from alignvec.errors import AlignvecError, RowsError


def generate(
    model: Annotated[str, typer.Argument(help="The base model: a transformers folder or a hub id.")],
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    vector: Annotated[
        list[str], typer.Option("--vector", "-v", help="NAME=FOLDER of an alignment vector; repeatable.")
    ],
    mixes: Annotated[
        list[str] | None,
        typer.Option("--mix", "-m", help="NAME=NUMBER,NAME=NUMBER: one answer per --mix, all in one batch."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 96,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    transfer: Annotated[bool, typer.Option(help="The vectors come from a different base, on purpose.")] = False,
) -> None:
    """Answer a prompt under one or several mixes, as the rows of one batch.

    Example: alignvec generate base/ "What is metformin?" -v medical=medical-av -m medical=-1 -m medical=1
    """
    import torch

    import alignvec
    from alignvec.loading import load_model, load_tokenizer

    if max_new_tokens < 1 or temperature < 0:
        raise AlignvecError("--max-new-tokens must be at least 1 and --temperature at least 0")
    requested = [mix("--mix", [text]) for text in mixes or []] or [{}]
    folder, device = model_folder(model), device_or_default(device)
    tokenizer, net = load_tokenizer(folder), load_model(folder, dtype=dtype)
    net.to(device).eval()
    alignment = alignvec.attach(net, vectors(vector), transfer=transfer)
    alignment.set_rows(requested)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {
        k: v.repeat(len(requested), 1).to(device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")
    }
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    limits = {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    try:
        with torch.inference_mode():
            output = net.generate(**inputs, **limits, **sampling)
    except RowsError as refusal:
        raise AlignvecError(f"{refusal.problem}; give one --mix") from None
    for row, wanted in zip(output[:, inputs["input_ids"].shape[1] :], requested, strict=True):
        name = ", ".join(f"{k}={v:g}" for k, v in wanted.items()) or "base"
        text = tokenizer.decode(row, skip_special_tokens=True).strip()
        console.print(answer(name, f"  {text}"), soft_wrap=True)
