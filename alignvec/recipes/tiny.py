"""Train the tiny models from nothing: `python -m alignvec.recipes.tiny --output tiny-models`, other `--shape`s as well.

Dataset, tokenizer, base, one DPO run per domain, measurements and a model card. A stage whose folder is already in the
output is kept as it is, so an interrupted run goes on where it stopped.
"""

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from alignvec.loading import load_model
from alignvec.recipes.align import LEARNING_RATE, STEPS, align
from alignvec.recipes.card import write_card
from alignvec.recipes.dataset import QUERIES
from alignvec.recipes.measure import measure
from alignvec.recipes.pretrain import make_tokenizer, pretrain
from alignvec.recipes.shapes import DEFAULT, SHAPES

PACKAGES = ("torch", "transformers", "trl", "datasets", "tokenizers", "accelerate", "safetensors")


def tiny(
    output: Annotated[Path, typer.Option(help="Folder for the models and the card.")] = Path("tiny-models"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 20,
    shape: Annotated[str, typer.Option(help=f"Architecture and size: {', '.join(SHAPES)}.")] = DEFAULT,
    tokenizer_from: Annotated[
        Path | None, typer.Option("--tokenizer", help="Take this folder's tokenizer; default: train one.")
    ] = None,
    base_steps: Annotated[int, typer.Option(help="Steps of the base, 16 sequences each.")] = 7300,
    align_steps: Annotated[int, typer.Option(help="DPO steps per domain, 16 pairs each.")] = STEPS,
    rows: Annotated[int, typer.Option(help="Held-out rows scored per domain and coefficient.")] = 200,
    quick: Annotated[bool, typer.Option(help="A few steps of everything, to see that it runs.")] = False,
    vectors: Annotated[Path | None, typer.Option(help="Also extract the three vectors into this folder.")] = None,
) -> None:
    """Train, measure and describe the tiny models.

    The shape llama-55m is meant for a GPU (--device cuda); it has not been trained yet.

    Example: python -m alignvec.recipes.tiny --output tiny-models
    """
    if shape not in SHAPES:
        raise typer.BadParameter(f"there is no shape {shape!r}; choose one of {', '.join(SHAPES)}")
    if quick:
        base_steps, align_steps, rows = 20, 5, 12
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    set_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    recipe = _Recipe(output / "recipe.json")
    recipe.record("setting", {"shape": shape, **_setting(seed, device)})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        if not (output / "base").exists():
            start = time.monotonic()
            own = make_tokenizer(seed) if tokenizer_from is None else _tokenizer(tokenizer_from)
            model = pretrain(own, base_steps, seed, device, progress, shape)
            _save(model, output / "base", own)
            recipe.record("base", {"steps": base_steps, "seconds": round(time.monotonic() - start)})
        tokenizer = _tokenizer(output / "base")
        for domain in QUERIES:
            if (output / domain).exists():
                continue
            start = time.monotonic()
            base: Any = load_model(output / "base", dtype=torch.float32, device_map=device)
            rate = LEARNING_RATE * SHAPES[shape].align_rate
            _save(align(base, tokenizer, domain, align_steps, seed, device, progress, rate), output / domain)
            recipe.record(domain, {"steps": align_steps, "seconds": round(time.monotonic() - start)})
        recipe.record("measured", measure(output, device, progress, count=rows, generated=max(1, rows // 3)))
    if vectors is not None:
        from alignvec.extract import extract

        for domain in QUERIES:
            extract(output / "base", output / domain).save(vectors / domain)
    write_card(output)


class _Recipe:
    """A JSON file that gains an entry with every stage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def record(self, name: str, entry: dict[str, Any]) -> None:
        self.entries[name] = entry
        temporary = self.path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(self.entries, indent=1) + "\n")
        os.replace(temporary, self.path)


def _setting(seed: int, device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "seed": seed,
        "device": name,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _save(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    """As bf16, under another name first: a folder that exists is complete."""
    temporary = folder.with_name(folder.name + ".tmp")
    model.bfloat16().save_pretrained(temporary)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    temporary.rename(folder)


if __name__ == "__main__":
    typer.run(tiny)
