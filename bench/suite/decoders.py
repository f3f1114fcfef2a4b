"""Decoders as the sections time them: rows at the end of a prompt, and a call that takes some steps of all of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alignvec import Decoder, Sampling
from bench.suite.case import Setting
from bench.timing import WARM_UP, Call, samples

GREEDY = Sampling()
Mix = Mapping[str, float]


def steps(setting: Setting) -> int:
    """Steps of one sample: a few on a GPU, so that the host runs ahead as it does in a long answer."""
    return 4 if setting.kind == "cuda" else 1


def room(setting: Setting) -> int:
    """Tokens by which a row grows while it is timed."""
    return (WARM_UP + setting.repeats) * steps(setting) + 1


def twin(model: nn.Module) -> nn.Module:
    """The same model in modules of its own, on the same parameters: what is attached to one is not on the other."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def prompt(setting: Setting, model: Any, tokens: int) -> Tensor:
    """Random token ids, int64 [tokens]."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(3, model.config.vocab_size, (tokens,), generator=generator).to(setting.device)


def decoder(setting: Setting, model: nn.Module, batch: int, context: int, **options: Any) -> Decoder:
    """A decoder whose rows can be timed at that context, with room for the keys and values of one such prompt."""
    made = Decoder(model, max_batch=batch, max_length=context + room(setting), **options)
    made.prefixes.capacity = made.nbytes // (batch * made.max_length) * context
    return made


@contextlib.contextmanager
def joined(decoder: Decoder, ids: Tensor, mixes: Sequence[Mix | None], steps: int) -> Iterator[Call]:
    """A row for each mix (None where the weights are what they are), and a call that takes `steps` steps of all.

    All rows begin with the keys and values of one prompt, read once under the first mix: what they hold does not
    change a step's time, and 64 prompts take longer to read than to decode from.
    """
    first, count = mixes[0], len(mixes)
    text = ids.tolist()
    limit = decoder.max_length + 1 - len(text)
    decoder.leave(decoder.join(text, first))
    rows = decoder.admit([text] * count, [first] * count, [GREEDY] * count, limit)
    for row, mix in zip(rows, mixes, strict=True):
        decoder.set_row(row, mix)

    try:
        yield partial(run, decoder, steps)
    finally:
        for row in rows:
            decoder.leave(row)


def run(decoder: Decoder, steps: int) -> None:
    """Queue that many steps of all rows, then wait for their tokens."""
    for _ in range(steps):
        decoder.launch()
    while decoder.pending:
        decoder.collect()


def timed(setting: Setting, calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Seconds of a step by each of some calls of `steps(setting)` steps, side by side."""
    taken = samples({name: [call] for name, call in calls.items()}, setting.device, setting.repeats, graphs=False)
    return {name: [seconds / steps(setting) for seconds in own] for name, own in taken.items()}
