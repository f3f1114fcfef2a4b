"""Preference training of the tiny models: one DPO run a domain, from the base, or one for a joint target."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.progress import Progress
from transformers import MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from alignvec.recipes.dataset import make_rows
from alignvec.train.dpo import train_dpo
from alignvec.train.pairs import pairs_from_questions
from alignvec.train.report import Report
from alignvec.vector import AlignmentVector

# Taken in turn. Half of them prefer generic to avoidance: otherwise what pushes generic answers down (expert over
# generic) outweighs what pushes them up, and the vector's negative direction would mean generic instead of avoidance.
PREFERENCES = (
    ("generic", "avoidance"),
    ("expert", "generic"),
    ("generic", "avoidance"),
    ("expert", "avoidance"),
    ("generic", "avoidance"),
    ("expert", "generic"),
)

STEPS = 150
# The run overshoots, all expert by three quarters of the way. Its weights are averaged with the base's (as in WiSE-FT,
# arXiv 2109.01903), so that the shipped vector is no longer than it need be and its negative direction stays readable.
KEPT = 0.75
BATCH_SIZE = 16
LEARNING_RATE = 1e-4
BETA = 0.05
# A little supervised loss on the chosen responses keeps the text readable; more of it teaches the domain's words, and
# the vector's negative direction would unlearn them.
SFT_WEIGHT = 0.03


def preference_pairs(domain: str, count: int, seed: int) -> Dataset:
    """`count` pairs from the domain's training rows in TRL's conversational format, the preferences in turn."""
    rows = make_rows(domain, "train")
    random.Random(f"pairs-{domain}-{seed}").shuffle(rows)
    return pairs_from_questions([row.question() for row in rows[:count]], PREFERENCES, count)


def joint_pairs(target: Mapping[str, str], count: int, seed: int) -> Dataset:
    """`count` pairs from the training rows of the target's domains in turn, each for the level wanted there."""
    each = -(-count // len(target))
    columns = []
    for domain in target:
        rows = make_rows(domain, "train")
        random.Random(f"pairs-{domain}-{seed}").shuffle(rows)
        columns.append([row.question() for row in rows[:each]])
    return pairs_from_questions([question for turn in zip(*columns, strict=True) for question in turn], target, count)


def align(
    model: MistralForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    domain: str,
    steps: int,
    seed: int,
    device: str,
    progress: Progress,
    learning_rate: float = LEARNING_RATE,
    beta: float = BETA,
    sft_weight: float = SFT_WEIGHT,
) -> MistralForCausalLM:
    """Train `model` (in place, float32) on the domain's preferences with TRL's DPO.

    Its weights end up `KEPT` of the way from the base to where the run ends. All parameters but the embedding, which is
    the head as well: moving it makes words likelier everywhere, and dialled below zero the vector would lose the words
    of the topic asked.
    """
    pairs = preference_pairs(domain, steps * BATCH_SIZE, seed)
    rates = {"learning_rate": learning_rate, "beta": beta, "sft_weight": sft_weight}
    vector = tiny_dpo(model, tokenizer, pairs, steps, seed, device, domain, progress, keep=KEPT, **rates)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in vector.items():
            parameters[name].add_(delta.to(parameters[name]))
    return model.eval()


def joint(
    base: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: Mapping[str, str],
    steps: int = STEPS,
    seed: int = 20,
    device: str = "auto",
    progress: Progress | None = None,
) -> AlignmentVector:
    """One DPO run for a target over several domains, such as `{"medical": "expert", "legal": "avoidance"}`.

    Every pair prefers the level wanted in its domain to another one. It is what a mix of vectors saves: the joint
    training that arXiv 2410.19206 compares with, once for each target. Weights are not averaged with the base's.
    """
    pairs = joint_pairs(target, steps * BATCH_SIZE, seed)
    rates = {"learning_rate": LEARNING_RATE, "beta": BETA, "sft_weight": SFT_WEIGHT}
    return tiny_dpo(base, tokenizer, pairs, steps, seed, device, "joint", progress, dtype="float32", **rates)


def tiny_dpo(
    base: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    steps: int,
    seed: int,
    device: str,
    label: str,
    progress: Progress | None,
    **settings: Any,
) -> AlignmentVector:
    """`train_dpo` as all runs of the tiny models have it: float32, batches of `BATCH_SIZE` pairs, a cosine schedule."""
    return train_dpo(
        base,
        tokenizer,
        pairs,
        steps=steps,
        batch_size=BATCH_SIZE,
        precision="float32",
        device=device,
        seed=seed,
        dpo={
            "lr_scheduler_type": "cosine",
            "warmup_steps": min(20, steps // 10),
            "gradient_checkpointing": False,
        },
        callbacks=[] if progress is None else [Report(progress, label)],
        **settings,
    )
