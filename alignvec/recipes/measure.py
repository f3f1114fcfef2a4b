"""What the trained models do on held-out queries, over coefficients."""

from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import PreTrainedModel

from alignvec.loading import load_model, load_tokenizer
from alignvec.recipes.dataset import QUERIES, make_rows
from alignvec.recipes.evaluate import answers, level_rates, topic_rate

COEFFICIENTS = tuple(step / 4 for step in range(-4, 5))
GENERATED_AT = (-1.0, -0.5, 0.0, 0.5, 1.0)


def mix_into(model: PreTrainedModel, base: dict, aligned: dict, coefficient: float) -> None:
    """Write `base + coefficient * (aligned - base)` into a float32 model, from two state dicts."""
    weights = model.state_dict()
    with torch.no_grad():
        for name, start in base.items():
            weights[name].copy_(start.float() + coefficient * (aligned[name].float() - start.float()))


def measure(output: Path, device: str, progress: Progress, count: int = 300, generated: int = 100) -> dict[str, Any]:
    """Level rates (by mean and by sum), topic rates and sample answers of the checkpoints under `output`.

    Takes the bf16 checkpoints as they are on disk; mixes are formed in float32. `count` held-out rows are scored per
    domain and coefficient, `generated` of them are answered greedily. Returns plain data, domain by domain.
    """
    tokenizer = load_tokenizer(output / "base")
    base = _weights(output / "base")
    model = load_model(output / "base", dtype=torch.float32, device_map=device).eval()
    vectors = {domain: _weights(output / domain) for domain in QUERIES}
    rows = {domain: make_rows(domain, "test")[:count] for domain in QUERIES}
    task = progress.add_task("measure", total=len(QUERIES) * (len(COEFFICIENTS) + len(GENERATED_AT) + 2))
    measured: dict[str, Any] = {}
    for domain in QUERIES:
        found: dict[str, Any] = {"rows": len(rows[domain]), "mean": {}, "sum": {}, "topic": {}, "samples": []}
        measured[domain] = found
        chosen = rows[domain][:generated]
        for coefficient in COEFFICIENTS:
            mix_into(model, base, vectors[domain], coefficient)
            for by in ("mean", "sum"):
                found[by][f"{coefficient:g}"] = level_rates(model, tokenizer, rows[domain], by)
            progress.update(task, advance=1)
            if coefficient in GENERATED_AT:
                texts = answers(model, tokenizer, [row.query for row in chosen])
                found["topic"][f"{coefficient:g}"] = topic_rate(texts, chosen)
                for row, text in list(zip(chosen, texts, strict=True))[:6]:
                    found["samples"].append({"coefficient": coefficient, "query": row.query, "answer": text})
                progress.update(task, advance=1)
        found["elsewhere"] = {}  # what this domain's vector does to the other domains, at coefficient 1
        for other in QUERIES:
            if other != domain:
                found["elsewhere"][other] = level_rates(model, tokenizer, rows[other][: count // 2])
                progress.update(task, advance=1)
    return measured


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder, dtype=torch.bfloat16).state_dict()
