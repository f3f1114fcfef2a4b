"""The base model, trained from scratch on textbook passages and on the training dialogues."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from rich.progress import Progress
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from alignvec.recipes.dataset import LEVELS, QUERIES, Row, make_rows, practice, split_topics, textbook
from alignvec.recipes.shapes import DEFAULT, make_config, shape_named
from alignvec.recipes.tokenizer import BOS, EOS, prompt_text, train_tokenizer

Example = tuple[list[int], int]  # token ids, and the first position that is learned

PRACTICE_WEIGHTS = (0.3, 0.55, 0.15)


@dataclass(frozen=True)
class Stage:
    """A part of the base's training: how often it sees each source and, in dialogues, each level."""

    name: str
    share: float  # of the steps
    learning_rate: float
    sources: dict[str, float]
    levels: tuple[float, float, float]  # avoidance, generic, expert


# The base first learns to speak and to prefer generic answers, then rehearses the other two levels and names; last, it
# reads up on the topics that its dialogues leave out, so that it knows all topics about equally well.
STAGES = (
    Stage("base", 4600 / 7300, 2e-3, {"dialogue": 0.5, "textbook": 0.2, "practice": 0.3}, (0.2, 0.6, 0.2)),
    Stage("rehearsal", 1400 / 7300, 1e-3, {"dialogue": 0.5, "textbook": 0.15, "practice": 0.35}, (0.4, 0.35, 0.25)),
    Stage(
        "reading",
        1300 / 7300,
        1e-3,
        {"dialogue": 0.3, "textbook": 0.1, "reading": 0.3, "practice": 0.3},
        (0.3, 0.45, 0.25),
    ),
)


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Trained on textbooks and made-up dialogues, so that held-out topics are cut as training topics are."""
    texts = []
    for domain in QUERIES:
        texts += list(textbook(domain, seed, copies=4))
        for row in islice(practice(domain, seed), 1500):
            texts += [row.query, row.avoidance, row.generic, row.expert]
    return train_tokenizer(texts)


def corpus(tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int) -> Iterator[Example]:
    """Endless examples: training dialogues with one level each, textbook passages, and made-up-name practice."""
    rng = random.Random(f"corpus-{seed}")
    dialogues = _shuffled([row for domain in QUERIES for row in make_rows(domain, "train")], rng)
    pages = _shuffled([page for domain in QUERIES for page in textbook(domain, seed, copies=12)], rng)
    left_out = {domain: split_topics(domain)[1] for domain in QUERIES}
    reading = _shuffled([p for d, topics in left_out.items() for p in textbook(d, seed + 1, 60, topics)], rng)
    names = [practice(domain, seed) for domain in QUERIES]
    while True:
        source = rng.choices(list(stage.sources), list(stage.sources.values()))[0]
        if source == "textbook":
            yield tokenizer(BOS + next(pages) + EOS)["input_ids"], 1
        elif source == "reading":
            yield tokenizer(BOS + next(reading) + EOS)["input_ids"], 1
        elif source == "dialogue":
            yield _dialogue(tokenizer, next(dialogues), stage.levels, rng)
        else:
            yield _dialogue(tokenizer, next(rng.choice(names)), PRACTICE_WEIGHTS, rng)


def pretrain(
    tokenizer: PreTrainedTokenizerFast, steps: int, seed: int, device: str, progress: Progress, shape: str = DEFAULT
) -> PreTrainedModel:
    """Train the base from nothing, stage by stage, `steps` in all. Returns it in float32.

    Raises AlignvecError for a shape that is not in `SHAPES`.
    """
    rate = shape_named(shape).rate
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(tokenizer, shape), dtype=torch.float32)
    model.to(device)
    for number, stage in enumerate(STAGES):
        own = replace(stage, learning_rate=stage.learning_rate * rate)
        train_stage(model, tokenizer, own, round(steps * stage.share), seed + number, progress)
    return model.eval()


def train_stage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    stage: Stage,
    steps: int,
    seed: int,
    progress: Progress,
    batch_size: int = 16,
) -> None:
    """Train with AdamW under a warm-up and cosine schedule; weights are in float32, a GPU's products in bf16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = min(100, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))),
    )
    task = progress.add_task(stage.name, total=steps)
    batches = _batches(corpus(tokenizer, stage, seed), batch_size, random.Random(seed))
    average = 0.0
    for step, examples in enumerate(islice(batches, steps)):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = _loss(model, examples, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        progress.update(task, advance=1, description=f"{stage.name}, loss {average:.3f}")


def _dialogue(tokenizer: PreTrainedTokenizerFast, row: Row, weights: tuple[float, ...], rng: random.Random) -> Example:
    prompt = tokenizer(prompt_text(row.query))["input_ids"]
    answer = tokenizer(getattr(row, rng.choices(LEVELS, weights)[0]) + EOS)["input_ids"]
    return prompt + answer, len(prompt)


def _shuffled(items: list, rng: random.Random) -> Iterator:
    while True:
        rng.shuffle(items)
        yield from items


def _batches(examples: Iterator[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Batches of like lengths, so that little is spent on padding."""
    while True:
        pool = sorted(islice(examples, 32 * size), key=lambda example: len(example[0]))
        batches = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(batches)
        yield from batches


def _loss(model: PreTrainedModel, examples: list[Example], pad: int) -> torch.Tensor:
    """Mean cross-entropy over the learned positions; the head runs on those alone."""
    length = max(len(ids) for ids, _ in examples)
    ids = torch.full((len(examples), length), pad)
    learned = torch.zeros((len(examples), length), dtype=torch.bool)
    for row, (tokens, start) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        learned[row, start : len(tokens)] = True
    ids, learned = ids.to(model.device), learned.to(model.device)
    # Padding is on the right here, so causal attention alone keeps it out of sight.
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[learned[:, 1:]]
    return cross_entropy(model.lm_head(hidden).float(), ids[:, 1:][learned[:, 1:]])
