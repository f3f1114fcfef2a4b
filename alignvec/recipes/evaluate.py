"""How a model answers: which stored level it finds likeliest, and whether what it writes names the topic.

Any causal language model will do: a checkpoint, a merged mix, or a base with vectors attached.
"""

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignvec.errors import AlignvecError
from alignvec.evaluate.scorer import Scorer
from alignvec.recipes.dataset import LEVELS, Row
from alignvec.recipes.tokenizer import prompt_text


def level_rates(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], by: str = "mean"
) -> dict[str, float]:
    """Share of rows whose likeliest stored response is of each level, by log-probability a token ("mean") or "sum".

    Raises AlignvecError for no rows.
    """
    choices = Scorer(model, tokenizer, [row.question() for row in rows])().choices(by)[0]
    return {level: (choices == i).float().mean().item() for i, level in enumerate(LEVELS)}


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[str],
    batch_size: int = 64,
    max_new_tokens: int = 72,
) -> list[str]:
    """Greedy answers, one a query."""
    texts = []
    for start in range(0, len(queries), batch_size):
        prompts = [prompt_text(query) for query in queries[start : start + batch_size]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        output = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)  # type: ignore[operator]
        texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def topic_rate(texts: Sequence[str], rows: Sequence[Row]) -> float:
    """Share of texts that name the topic their row asks about, whatever the capitals."""
    if not rows or len(texts) != len(rows):
        raise AlignvecError(f"topic_rate needs one text a row, got {len(texts)} texts for {len(rows)} rows.")
    named = [
        re.search(rf"\b{re.escape(row.topic.lower())}\b", text.lower()) is not None
        for text, row in zip(texts, rows, strict=True)
    ]
    return sum(named) / len(rows)
