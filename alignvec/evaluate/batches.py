"""Questions as token batches, and the log-probabilities of their responses out of a model's logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignvec.errors import AlignvecError
from alignvec.evaluate.questions import Question

PIECE = 2048  # positions whose logits are in float32 at a time

Prompt = Callable[[Question], str]


@dataclass(frozen=True)
class Encoded:
    """A question's tokens: the prompt, and a response for each level with the end of text behind it."""

    prompt: list[int]
    responses: list[list[int]]


@dataclass(frozen=True)
class Batch:
    """Sequences that go through the model together, padded on the right.

    Logits are wanted from position ``first`` on. Entry i of ``sources`` is a position in them, flattened over
    [sequences, length - first], which predicts token ``targets[i]`` of response ``owners[i]`` (question * levels +
    level). Packed sequences hold a prompt once and all of its responses, told apart by ``positions`` [sequences,
    length] and ``mask`` (bool [sequences, 1, length, length], True where a token may look).
    """

    ids: Tensor
    first: int
    sources: Tensor
    targets: Tensor
    owners: Tensor
    positions: Tensor | None = None
    mask: Tensor | None = None

    def logits(self, model: PreTrainedModel, rows: int = 1) -> Tensor:
        """The model's logits [rows * sequences, length - first, vocabulary], every sequence once for each row."""
        inputs: dict[str, Any] = {"input_ids": self.ids.repeat(rows, 1).to(model.device)}
        if self.mask is not None and self.positions is not None:
            hidden = torch.finfo(model.dtype).min
            mask = torch.zeros(self.mask.shape, dtype=model.dtype).masked_fill_(~self.mask, hidden)
            inputs["attention_mask"] = mask.repeat(rows, 1, 1, 1).to(model.device)
            inputs["position_ids"] = self.positions.repeat(rows, 1).to(model.device)
        if "logits_to_keep" not in inspect.signature(model.forward).parameters:
            return model(**inputs, use_cache=False).logits[:, self.first :]
        keep = torch.arange(self.first, self.ids.shape[1], device=model.device)
        return model(**inputs, use_cache=False, logits_to_keep=keep).logits

    def sums(self, logits: Tensor, responses: int, rows: int = 1) -> Tensor:
        """Log-probability of every response this batch holds a token of, float32 [rows, responses] on the CPU."""
        flat = logits.flatten(0, 1)
        positions = len(flat) // rows
        shift = torch.arange(rows)[:, None]
        sources = (self.sources + shift * positions).flatten().to(flat.device)
        targets = self.targets.repeat(rows).to(flat.device)
        scale = torch.cat([piece.float().logsumexp(-1) for piece in flat.split(PIECE)])
        found = flat[sources, targets].float() - scale[sources]
        owners = (self.owners + shift * responses).flatten()
        return torch.zeros(rows * responses).index_add_(0, owners, found.cpu()).view(rows, responses)


def encode(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], levels: Sequence[str], prompt: Prompt | None
) -> list[Encoded]:
    """Tokens of every question; by default its query as one user's turn of the tokenizer's chat template.

    ``prompt`` writes the text before the response itself. A tokenizer without a template gets the bare query.
    """
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    encoded = []
    for question in questions:
        if prompt is not None:
            before = tokenizer(prompt(question), add_special_tokens=False)["input_ids"]
        elif tokenizer.chat_template:
            turns = [{"role": "user", "content": question.query}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            before = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            before = tokenizer(question.query)["input_ids"]
        texts = tokenizer([question.responses[level] for level in levels], add_special_tokens=False)["input_ids"]
        if not before or not all(texts):
            raise AlignvecError(f"{question.query!r} has a prompt or a response that makes no tokens")
        encoded.append(Encoded(list(before), [list(text) + end for text in texts]))
    return encoded


def plan(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of sequences of like lengths, at most ``budget`` tokens (padding included) at a time, or one sequence."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    chosen: list[int] = []
    for index in order:
        if chosen and lengths[index] * (len(chosen) + 1) > budget:
            yield chosen
            chosen = []
        chosen.append(index)
    if chosen:
        yield chosen


def batches(encoded: Sequence[Encoded], budget: int, packed: bool) -> list[Batch]:
    """All responses of all questions in batches of about ``budget`` tokens; ``packed`` shares a prompt among them."""
    levels = len(encoded[0].responses)
    sequences: list[tuple[list[int], list[list[int]], int]] = []  # prompt, responses, owner of the first
    for index, question in enumerate(encoded):
        if packed:
            sequences.append((question.prompt, question.responses, index * levels))
        else:
            sequences += [(question.prompt, [r], index * levels + i) for i, r in enumerate(question.responses)]
    lengths = [len(prompt) + sum(map(len, responses)) for prompt, responses, _ in sequences]
    return [_batch([sequences[i] for i in chosen], packed) for chosen in plan(lengths, budget)]


def _batch(sequences: Sequence[tuple[list[int], list[list[int]], int]], packed: bool) -> Batch:
    length = max(len(prompt) + sum(map(len, responses)) for prompt, responses, _ in sequences)
    first = min(len(prompt) for prompt, _, _ in sequences) - 1
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    positions, segments = torch.zeros_like(ids), torch.full_like(ids, -1)
    sources, targets, owners = [], [], []
    for row, (prompt, responses, owner) in enumerate(sequences):
        start, offset = len(prompt), row * (length - first) - first
        ids[row, :start], positions[row, :start], segments[row, :start] = torch.tensor(prompt), torch.arange(start), 0
        for level, response in enumerate(responses):
            stop = start + len(response)
            ids[row, start:stop], segments[row, start:stop] = torch.tensor(response), level + 1
            positions[row, start:stop] = torch.arange(len(prompt), len(prompt) + len(response))
            # Each token is predicted by the one before it; a response's first token by the prompt's last.
            sources += [offset + len(prompt) - 1, *range(offset + start, offset + stop - 1)]
            targets += response
            owners += [owner + level] * len(response)
            start = stop
    picks = torch.tensor(sources), torch.tensor(targets), torch.tensor(owners)
    if not packed:
        return Batch(ids, first, *picks)
    mask = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    return Batch(ids, first, *picks, positions, (mask & torch.ones(length, length, dtype=torch.bool).tril())[:, None])
