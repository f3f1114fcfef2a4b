"""Whole sequences by a decoder: what `model.generate` returns, and as its `custom_generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignvec.decoding.mixes import Mix, Schedule
from alignvec.decoding.sampling import Sampling
from alignvec.decoding.step import MAX_POLICIES
from alignvec.errors import AlignvecError
from alignvec.numbers import float32_number
from alignvec.printable import quoted

if TYPE_CHECKING:
    from alignvec.decoding.decoder import Decoder

AHEAD = 2  # steps under way on a GPU: the next one is queued before the last one's tokens are looked at

Blend = Sequence[tuple[Mix, float]]
Stop = Callable[[list[int]], bool]  # whether a sequence, prompt and answer, is complete


def sequences(
    decoder: Decoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    mixes: Sequence[Schedule | None] | None,
    blend: Blend | None,
    sampling: Sampling,
    max_new_tokens: int,
    stop: Stop,
    streamer: Any,
    recompute: bool,
) -> list[list[int]]:
    """The answers to a batch of prompts [batch, tokens], padded on the left."""
    prompts = unpadded(input_ids, attention_mask)
    policies = _policies(blend, mixes, decoder.max_batch)
    if mixes is not None and len(mixes) != len(prompts):
        raise AlignvecError(f"mixes has {len(mixes)} entries for a batch of {len(prompts)}; give one for each sequence")
    if len(prompts) * len(policies) > decoder.free:
        raise AlignvecError(
            f"{len(prompts)} sequences of {len(policies)} rows each need more than the {decoder.free} free rows of the "
            "decoder; make it with a larger max_batch, or let rows leave"
        )
    samplings = [sampling.stream(number) for number in range(len(prompts))]
    groups: list[list[int]] = []
    try:
        if blend is None:
            own = mixes or [None] * len(prompts)
            rows = decoder.admit(prompts, own, samplings, max_new_tokens, recompute=recompute)
            groups = [[row] for row in rows]
        else:
            weights = [weight for _, weight in blend]
            for prompt, each in zip(prompts, samplings, strict=True):
                shares = [each] * len(policies)
                groups.append(
                    decoder.admit(
                        [prompt] * len(policies), policies, shares, max_new_tokens, recompute=recompute, weights=weights
                    )
                )
        return _decode(decoder, groups, prompts, max_new_tokens, stop, streamer)
    finally:
        for row in (row for group in groups for row in group):
            if decoder.taken(row):
                decoder.leave(row)


def _decode(
    decoder: Decoder,
    groups: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Stop,
    streamer: Any,
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in groups]
    unfinished = dict(enumerate(groups))
    ahead = AHEAD if decoder.state.tokens.is_cuda else 1
    while unfinished:
        while decoder.pending < ahead and decoder.going:
            decoder.launch()
        tokens = decoder.collect()
        for number, group in list(unfinished.items()):
            token = tokens.get(group[0])
            if token is None:  # a step of other rows
                continue
            answers[number].append(token)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
            if len(answers[number]) == max_new_tokens or stop([*prompts[number], *answers[number]]):
                del unfinished[number]
                for row in group:
                    decoder.leave(row)
    if streamer is not None:
        streamer.end()
    return answers


def unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The prompts of a batch padded on the left.

    Raises:
        AlignvecError: other shapes, or padding that is not on the left.
    """
    for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not isinstance(value, Tensor) and (value is not None or name == "input_ids"):
            raise AlignvecError(f"{name} must be a tensor [batch, tokens], not a {type(value).__name__}")
    if input_ids.dim() != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        mask = "" if attention_mask is None else f" and attention_mask {list(attention_mask.shape)}"
        raise AlignvecError(f"input_ids {list(input_ids.shape)}{mask} must be of one shape [batch, tokens]")
    rows: list[list[int]] = input_ids.tolist()
    if attention_mask is None:
        return rows
    prompts = []
    for number, (row, own) in enumerate(zip(rows, attention_mask.bool().tolist(), strict=True)):
        padding = own.index(True) if True in own else len(own)
        if not all(own[padding:]):
            raise AlignvecError(f"sequence {number} is not padded on the left; set the tokenizer's padding_side='left'")
        prompts.append(row[padding:])
    return prompts


def padded(input_ids: Tensor, answers: Sequence[Sequence[int]], pad: int | None) -> Tensor:
    """Prompts as they came, and answers padded on the right: int64 [batch, tokens + longest answer]."""
    longest = max(map(len, answers))
    if pad is None and any(len(answer) < longest for answer in answers):
        raise AlignvecError("answers differ in length and there is no pad token; give pad_token_id")
    new = [[*answer, *[pad] * (longest - len(answer))] for answer in answers]
    return torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], 1)


def stopping(eos: set[int], stop_strings: str | Sequence[str] | None, tokenizer: Any) -> Stop:
    """A sequence stops with an end token, or when its answer completes one of these strings.

    Raises:
        AlignvecError: stop strings without the tokenizer that they are to be found with.
    """
    if not stop_strings:
        return until(eos)
    if tokenizer is None:
        raise AlignvecError("stop_strings needs the tokenizer; give tokenizer=...")
    from transformers import StopStringCriteria  # with which transformers imports triton

    return until(eos, [StopStringCriteria(tokenizer, stop_strings)])  # type: ignore[arg-type]


def until(eos: set[int], criteria: Sequence[Any] = ()) -> Stop:
    """A sequence stops with an end token, or by one of transformers' criteria."""

    def stop(ids: list[int]) -> bool:
        if ids[-1] in eos:
            return True
        return any(bool(torch.as_tensor(criterion(torch.tensor([ids]), None)).all()) for criterion in criteria)

    return stop


def end_tokens(model: Any, eos_token_id: int | Sequence[int] | None) -> set[int]:
    """The ids that end a sequence: those given, none for -1, or the model's."""
    eos = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    if eos is None:
        return set()
    return {int(token) for token in (eos if isinstance(eos, Sequence | Tensor) else [eos]) if int(token) >= 0}


def pad_token(model: Any, eos: set[int]) -> int | None:
    config = model.generation_config
    return config.pad_token_id if config.pad_token_id is not None else min(eos, default=None)


def shares(weights: Sequence[float], prompts: Sequence[Sequence[int]]) -> list[float]:
    """The weights of a blend's policies, one for each of its rows.

    Raises:
        AlignvecError: not one for each of up to 8 equal prompts, or one that is not finite in float32.
    """
    if not len(weights) == len(prompts) <= MAX_POLICIES or any(prompt != prompts[0] for prompt in prompts):
        raise AlignvecError(
            f"{len(weights)} weights were given for {len(prompts)} rows; a blend has 1 to {MAX_POLICIES} rows of one "
            "prompt, and a weight for each"
        )
    return [float32_number(weight, "the weight of policy", number) for number, weight in enumerate(weights)]


def _policies(blend: Blend | None, mixes: object, max_batch: int) -> list[Mix | None]:
    """The mixes whose logits are added up; one that is none without a blend."""
    if blend is None:
        return [None]
    if mixes is not None:
        raise AlignvecError("blend says which mixes every sequence decodes with; leave mixes out")
    if not 1 <= len(blend) <= MAX_POLICIES:
        raise AlignvecError(f"blend has {len(blend)} policies; give 1 to {MAX_POLICIES}")
    for item in blend:
        if not isinstance(item, Sequence) or len(item) != 2 or not isinstance(item[0], Mapping):
            raise AlignvecError(f"{quoted(item)} is no policy of a blend; give (mix, weight) pairs")
    return [mix for mix, _ in blend]
