"""Levels of generated answers, given by a judge: the generation accuracy of arXiv 2410.19206."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignvec.alignment import Alignment
from alignvec.errors import AlignvecError
from alignvec.evaluate.questions import Question, members_of
from alignvec.evaluate.scores import Scores

BATCH = 64  # sequences that are decoded together


class Judge(Protocol):
    """Gives each text, an answer to its query, one of `levels`; None where it cannot say."""

    levels: tuple[str, ...]

    def judge(self, queries: Sequence[str], texts: Sequence[str]) -> list[str | None]: ...


@dataclass(frozen=True)
class Generated:
    """Answers under every mix and what a judge made of them: ``texts`` and ``verdicts`` are [mixes][questions]."""

    levels: tuple[str, ...]
    domains: tuple[str, ...]
    texts: list[list[str]]
    verdicts: list[list[str | None]]

    def rates(self) -> Tensor:
        """Share of each domain's answers that are of each level, float64 [mixes, domains, levels].

        Domains are in order of appearance. Answers without a verdict count as none of the levels: where there are any,
        shares add up to less than 1.
        """
        return self._by_domain(torch.nn.functional.one_hot(self._indices() + 1, len(self.levels) + 1)[..., 1:].double())

    @property
    def unjudged(self) -> int:
        """Number of answers without a verdict."""
        return int((self._indices() < 0).sum())

    def agreement(self, scores: Scores, by: str = "mean") -> Tensor:
        """Share of answers whose verdict is the level of the likeliest stored response, float64 [mixes, domains].

        Raises:
            AlignvecError: the scores are of other mixes, questions or levels.
        """
        if set(scores.levels) != set(self.levels) or scores.domains != self.domains:
            raise AlignvecError("scores and verdicts are of other questions or levels: score the questions judged")
        if scores.mean.shape[0] != len(self.verdicts):
            raise AlignvecError(f"there are {scores.mean.shape[0]} mixes with scores and {len(self.verdicts)} judged")
        order = torch.tensor([self.levels.index(level) for level in scores.levels])
        agreed = order[scores.choices(by)] == self._indices()
        return self._by_domain(agreed[..., None].double())[..., 0]

    def _indices(self) -> Tensor:
        """Columns of the verdicts, int64 [mixes, questions]; -1 for none."""
        places = {level: i for i, level in enumerate(self.levels)}
        return torch.tensor([[-1 if v is None else places[v] for v in verdicts] for verdicts in self.verdicts])

    def _by_domain(self, values: Tensor) -> Tensor:
        """Means over each domain's questions of [mixes, questions, n]."""
        return torch.stack([values[:, own].mean(1) for own in members_of(self.domains)], dim=1)


def generation_rates(
    judge: Judge,
    model: PreTrainedModel | Alignment,
    tokenizer: Any,
    questions: Sequence[Question],
    mixes: Sequence[Mapping[str, float]] = ({},),
    max_new_tokens: int = 96,
) -> Tensor:
    """Share of each domain's greedy answers that are of each level, float64 [mixes, domains, levels].

    Levels are the judge's. Raises AlignvecError as `judge_generated`.
    """
    return judge_generated(judge, model, tokenizer, questions, mixes, max_new_tokens).rates()


def judge_generated(
    judge: Judge,
    model: PreTrainedModel | Alignment,
    tokenizer: Any,
    questions: Sequence[Question],
    mixes: Sequence[Mapping[str, float]] = ({},),
    max_new_tokens: int = 96,
    *,
    progress: Callable[[float], None] | None = None,
) -> Generated:
    """Answer every question under every mix, greedily, and let a judge give the answers their levels.

    Args:
        judge: such as `ClassifierJudge` or `EndpointJudge`.
        model: a causal language model, or vectors attached to one.
        progress: called with the share of the answers that are generated.

    Raises:
        AlignvecError: no questions or mixes, an unknown vector name, or as the judge does.
    """
    texts = generate_answers(model, tokenizer, questions, mixes, max_new_tokens, progress=progress)
    count = len(questions)
    queries = [question.query for question in questions] * len(mixes)
    verdicts = judge.judge(queries, [text for row in texts for text in row])
    cut = [verdicts[start : start + count] for start in range(0, len(verdicts), count)]
    return Generated(judge.levels, tuple(question.domain for question in questions), texts, cut)


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel | Alignment,
    tokenizer: Any,
    questions: Sequence[Question],
    mixes: Sequence[Mapping[str, float]] = ({},),
    max_new_tokens: int = 96,
    *,
    progress: Callable[[float], None] | None = None,
) -> list[list[str]]:
    """Greedy answers, [mixes][questions]; a batch carries many mixes, and what was dialled before comes back.

    Queries are a user's turn of the tokenizer's chat template, where it has one.

    Raises:
        AlignvecError: no questions or mixes, a mix for a model without vectors, an unknown vector name, a mix that is
            materialised.
    """
    if not questions or not mixes:
        raise AlignvecError("there is nothing to generate: give at least one question and one mix")
    if max_new_tokens < 1:
        raise AlignvecError(f"max_new_tokens={max_new_tokens} must be at least 1")
    alignment = model if isinstance(model, Alignment) else None
    if alignment is None and any(mixes):
        raise AlignvecError("this model has no vectors attached: give an alignvec.attach() result to turn mixes")
    prompts = [_prompt(tokenizer, question.query) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
    texts = [[""] * len(questions) for _ in mixes]
    rows = min(len(mixes), BATCH, alignment.max_rows if alignment else BATCH)
    each = max(1, BATCH // rows)
    net = model.model if isinstance(model, Alignment) else model
    done = 0
    with alignment.using({}) if alignment else contextlib.nullcontext():
        for first in range(0, len(mixes), rows):
            chosen = mixes[first : first + rows]
            if alignment is not None:
                alignment.set_rows(chosen)
            for start in range(0, len(order), each):
                members = order[start : start + each]
                answers = _answer(net, tokenizer, [prompts[i] for i in members], len(chosen), max_new_tokens)
                for number, text in enumerate(answers):
                    texts[first + number // len(members)][members[number % len(members)]] = text
                done += len(answers)
                if progress is not None:
                    progress(done / (len(mixes) * len(questions)))
    return texts


def _answer(model: Any, tokenizer: Any, prompts: list[list[int]], rows: int, limit: int) -> list[str]:
    """Answers to all prompts under the first mix, then all under the second, and so on."""
    end = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids, mask = ids.repeat(rows, 1).to(model.device), mask.repeat(rows, 1).to(model.device)
    output = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=limit, pad_token_id=end
    )
    texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _prompt(tokenizer: Any, query: str) -> list[int]:
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": query}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(query)["input_ids"])
