"""How a model answers: which stored level it finds likeliest, and whether what it writes names the topic.

Any causal language model will do: a checkpoint, a merged mix, or a base with vectors attached.
"""

import re
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignvec.errors import AlignvecError
from alignvec.recipes.dataset import LEVELS, Row
from alignvec.recipes.tokenizer import EOS, prompt_text


@torch.no_grad()
def level_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each stored response, given the query: mean per token and sum, in nats.

    Both are float32 on the CPU, [rows, 3], columns as in `LEVELS`; the end-of-text token counts as part of a response.
    """
    if not rows:
        raise AlignvecError("There are no rows to score: pass at least one.")
    sequences = []
    for row in rows:
        prompt = tokenizer(prompt_text(row.query))["input_ids"]
        for level in LEVELS:
            answer = tokenizer(getattr(row, level) + EOS)["input_ids"]
            sequences.append((prompt + answer, len(prompt)))
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index][0]))
    mean, total = torch.empty(len(sequences)), torch.empty(len(sequences))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        lengths = torch.tensor([len(sequences[index][0]) for index in chosen])
        begins = torch.tensor([sequences[index][1] for index in chosen])
        ids = torch.full((len(chosen), int(lengths.max())), int(tokenizer.pad_token_id))
        for slot, index in enumerate(chosen):
            ids[slot, : lengths[slot]] = torch.tensor(sequences[index][0])
        position = torch.arange(ids.shape[1])
        mask = (position < lengths[:, None]).long()
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        losses = cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none").cpu()
        answered = (position[1:] >= begins[:, None]) & (position[1:] < lengths[:, None])
        total[chosen] = -(losses * answered).sum(1)
        mean[chosen] = total[chosen] / answered.sum(1)
    return mean.view(-1, len(LEVELS)), total.view(-1, len(LEVELS))


def level_rates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int = 64,
    score: str = "mean",
) -> dict[str, float]:
    """Share of rows whose likeliest response is of each level, by `score`: "mean" per token, or "sum"."""
    if score not in ("mean", "sum"):
        raise AlignvecError(f'score must be "mean" or "sum", not {score!r}.')
    mean, total = level_scores(model, tokenizer, rows, batch_size)
    return rates_of(mean if score == "mean" else total)


def rates_of(scores: torch.Tensor) -> dict[str, float]:
    """Level rates from scores [rows, 3]."""
    counts = torch.bincount(scores.argmax(1), minlength=len(LEVELS)).tolist()
    return {level: count / len(scores) for level, count in zip(LEVELS, counts, strict=True)}


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
