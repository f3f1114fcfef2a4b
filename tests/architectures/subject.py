"""A base, its tuned copy and the vector between them; logits and tokens of a model under the sweep's inputs."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import alignvec
from alignvec import Alignment, AlignmentVector
from tests.architectures.configurations import merged, tuned
from tests.architectures.inputs import NEW_TOKENS, Inputs, inputs, prompt

GREEDY = {"max_new_tokens": NEW_TOKENS, "eos_token_id": -1, "do_sample": False, "use_cache": True}

Results = dict[str, Tensor]


class Subject:
    """A base, its tuned copy, the vector between them, and what they are called with."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base, self.tuned = base, tuned(base)
        self.half = merged(self.base, self.tuned, 0.5)

    @functools.cached_property
    def vector(self) -> AlignmentVector:
        return alignvec.extract(self.base, self.tuned)

    def attach(self) -> tuple[PreTrainedModel, Alignment]:
        """A fresh copy of the base with the vector on it: what one check leaves behind meets no other."""
        model = copy.deepcopy(self.base)
        return model, alignvec.attach(model, {"v": self.vector})


def logits(model: PreTrainedModel, batch: int = 2) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**inputs(model, batch))
    return output.logits if hasattr(output, "logits") else output[0]


def generated(
    model: PreTrainedModel, name: str, row: int | None = None, images: bool = True, alone: bool = False
) -> Results:
    """Greedy tokens and their logits [batch, tokens, vocabulary] of two prompts, or of one row of them.

    alone: the row in a batch of its own, where a prompt is text: some models mix the rows of a batch up (Rwkv adds a
    state [batch, features] to activations [batch, 1, features]).
    """
    torch.manual_seed(0)
    given: Inputs = prompt(model, 2, images)
    rows, batch = (slice(None) if row is None else slice(row, row + 1)), 2
    if alone and given.keys() == {"input_ids"} and len(given["input_ids"]) == batch:
        given, rows, batch = {"input_ids": given["input_ids"][rows]}, slice(None), 1
    with torch.no_grad():
        generate: Any = model.generate
        output = generate(**given, **GREEDY, return_dict_in_generate=True, output_logits=True)
    scores = torch.stack(output.logits, 1)
    scores = scores.reshape(batch, -1, *scores.shape[1:])[rows]
    return {f"tokens {name}": output.sequences.reshape(batch, -1)[rows], f"logits {name}": scores}
