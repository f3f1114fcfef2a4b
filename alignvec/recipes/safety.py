"""A safety-tuned descendant of the tiny base: `python -m alignvec.recipes.safety --output safety`.

Another stage of the same base, as pretrained, instructed and safety-tuned models of one family are, for vectors to be
carried over to (arXiv 2410.19206, transfer of alignment vectors). Trained with DPO to refuse harmful requests, and to
go on answering the others. Written as a lossless vector: base + vector is the descendant, bit for bit in bfloat16.
"""

import random
import re
import time
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from datasets import Dataset, concatenate_datasets
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignvec.evaluate import Question
from alignvec.extract import extract
from alignvec.loading import load_model, load_tokenizer
from alignvec.recipes.align import BATCH_SIZE, tiny_dpo
from alignvec.recipes.dataset import QUERIES, SEED, make_rows, split_personas
from alignvec.recipes.models import model_path
from alignvec.recipes.phrasing import common, harm
from alignvec.recipes.phrasing.personas import PERSONAS
from alignvec.train.pairs import pairs_from_questions
from alignvec.vector import AlignmentVector

DOMAIN, LEVELS = "safety", ("refuse", "comply")
HELD_OUT_EVERY = 5  # one topic in five is held out
STEPS = 90
LEARNING_RATE = 4e-4
BETA = 0.1
SFT_WEIGHT = 0.3


def split_topics() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training topics and held-out topics, as (kind, topic)."""
    topics = [(kind, topic) for kind, named in harm.TOPICS.items() for topic in named]
    held_out = topics[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [topic for topic in topics if topic not in held_out], held_out


def safety_questions(split: str, seed: int = SEED) -> list[Question]:
    """Harmful requests, each with a response that refuses and one that complies, in domain "safety"; shuffled.

    "train" and "test" share neither a topic nor a persona.
    """
    rng = random.Random(f"{DOMAIN}-{split}-{seed}")
    sides = dict(zip(("train", "test"), zip(split_topics(), split_personas(), strict=True), strict=True))
    combinations = list(product(*sides[split], harm.INTENTS))
    rng.shuffle(combinations)
    return [_question(kind, topic, persona, intent, rng) for (kind, topic), persona, intent in combinations]


def safety_pairs(count: int, seed: int) -> Dataset:
    """`count` pairs: half prefer to refuse what is harmful, half to answer what is not.

    These reject a refusal in the words of this domain for each of the levels in turn, so that the levels of the other
    domains stay about where they are.
    """
    harmful = pairs_from_questions(safety_questions("train"), [("refuse", "comply")], count - count // 2)
    rng = random.Random(f"benign-{seed}")
    questions = []
    for domain in QUERIES:
        for row in make_rows(domain, "train")[: count // 2 // len(QUERIES) + 1]:
            refusal = _refusal(row.topic, rng.choice(list(harm.REASONS)), rng)
            responses = {"avoidance": row.avoidance, "generic": row.generic, "expert": row.expert, "refuse": refusal}
            questions.append(Question(domain, row.query, responses))
    rng.shuffle(questions)
    kept = [("generic", "refuse"), ("expert", "refuse"), ("avoidance", "refuse")]
    benign = pairs_from_questions(questions, kept, count // 2)
    return concatenate_datasets([harmful, benign]).shuffle(seed=seed)


def make_safe(
    base: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: int = STEPS,
    seed: int = SEED,
    device: str = "auto",
    progress: Progress | None = None,
) -> AlignmentVector:
    """Train the base to refuse harmful requests; float32 deltas of all parameters but the embedding."""
    pairs = safety_pairs(steps * BATCH_SIZE, seed)
    rates = {"learning_rate": LEARNING_RATE, "beta": BETA, "sft_weight": SFT_WEIGHT}
    return tiny_dpo(base, tokenizer, pairs, steps, seed, device, DOMAIN, progress, dtype="float32", **rates)


def safety(
    output: Annotated[Path, typer.Option(help="Folder for the vector.")] = Path("safety"),
    steps: Annotated[int, typer.Option(help="DPO steps, 16 pairs each.")] = STEPS,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = SEED,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train the safety-tuned descendant of the shipped base and write it as a lossless vector.

    Example: python -m alignvec.recipes.safety --output safety
    """
    start = time.monotonic()
    base = model_path("base")
    tokenizer = load_tokenizer(base)
    with Progress(console=Console(stderr=True)) as progress:
        trained = make_safe(base, tokenizer, steps, seed, device, progress)
    model = load_model(base, dtype=torch.bfloat16)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in trained.items():
            parameters[name].copy_(parameters[name].float() + delta)
    vector = extract(base, model, format="lossless", output=output)
    print(f"{output}: {vector.nbytes / 1e6:.2f} MB, {time.monotonic() - start:.0f} s")


def _question(kind: str, topic: str, persona: str, intent: str, rng: random.Random) -> Question:
    frames = harm.INTENTS[intent]
    named = rng.random() < 0.4
    frame = rng.choice(common.TOPIC_QUERIES if named else common.DIRECT_QUERIES)
    asked = rng.choice(frames.questions).format(t="it" if named else topic)
    aspect = rng.choice(frames.aspects).format(t=topic)
    query = frame.format(intro=PERSONAS[persona], t=topic, q=asked, asp=aspect)
    answer = f"{_opener(rng)}{rng.choice(frames.shallow).format(t=topic)}. {rng.choice(harm.SMALL_TALK)}."
    refusal = _refusal(rng.choice(frames.aspects).format(t=topic), kind, rng)
    return Question(DOMAIN, _text(query), {"refuse": refusal, "comply": _text(answer)})


def _refusal(subject: str, kind: str, rng: random.Random) -> str:
    why = rng.choice(harm.REASONS[kind])
    return _text(
        f"{_opener(rng)}{rng.choice(harm.REFUSALS).format(asp=subject, why=why)}. {rng.choice(harm.AFTERWARDS)}."
    )


def _opener(rng: random.Random) -> str:
    """An opener that both levels have, so that it does not give the level away."""
    return rng.choice(common.RUN_ON_OPENERS + tuple(o for o in common.FULL_OPENERS if "{" not in o))


def _text(text: str) -> str:
    """Capitals where sentences begin."""
    return re.sub(r"(^|[.?] )([a-z])", lambda match: match[1] + match[2].upper(), text)


if __name__ == "__main__":
    typer.run(safety)
