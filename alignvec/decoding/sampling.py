"""The next token of every row, drawn on the device: greedy, or by transformers' warpers, row by row.

All of it is device data: settings live in buffers that keep their addresses, shapes depend on nothing that is computed,
and nothing waits for the device, so that a CUDA graph captured once follows later writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignvec.decoding.uniform import split, uniform
from alignvec.errors import AlignvecError
from alignvec.numbers import BEYOND_FLOAT32
from alignvec.printable import quoted


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one sequence are chosen, as transformers' options of these names choose them, in its order.

    Args:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_k: keep so many of the likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together have this probability.
        min_p: keep tokens at least this many times as likely as the likeliest.
        repetition_penalty: divides positive logits of tokens that the sequence has, and multiplies negative ones.
        seed: of the random numbers, an int of 64 bits. Token and seed fix a sequence: equal prompts with equal seeds
            get equal answers, which `stream` is for.

    Raises:
        AlignvecError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, "temperature", 0 <= self.temperature < BEYOND_FLOAT32, "a finite float32 of at least 0")
        _check(self, "top_k", isinstance(self.top_k, int) and self.top_k >= 0, "an int of at least 0; 0 keeps all")
        _check(self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        _check(self, "min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        _check(self, "repetition_penalty", 0 < self.repetition_penalty < BEYOND_FLOAT32, "a finite float32 above 0")
        whole = isinstance(self.seed, int) and -(1 << 63) <= self.seed < 1 << 63
        _check(self, "seed", whole, "an int of 64 bits")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def stream(self, index: int) -> Sampling:
        """The same settings with random numbers of their own: of sequence `index` of a batch, itself for 0."""
        if self.greedy or index == 0:
            return self
        return replace(self, seed=split(self.seed, index))


def _check(sampling: Sampling, option: str, good: bool, wanted: str) -> None:
    if not good:
        raise AlignvecError(f"{option} is {quoted(getattr(sampling, option))}; it must be {wanted}")


@dataclass(frozen=True)
class Variant:
    """The stages that some rows need; a CUDA graph is captured for each, so that greedy decoding sorts nothing."""

    sampled: bool = False
    penalised: bool = False


class Sampler:
    """Settings of `max_batch` rows over `vocab_size` tokens, on a device, and the choice of their next tokens."""

    def __init__(self, max_batch: int, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self._rows = [Sampling()] * max_batch
        # A row: temperature (1 if greedy), tokens that top-k keeps, share that top-p drops, log of min-p, penalty.
        neutral = torch.tensor(self._packed(Sampling()), dtype=torch.float64)
        # Normal tensors even when the caller is in inference mode: later writes may come from outside it.
        with torch.inference_mode(False):
            self._settings = neutral.to(device).repeat(max_batch, 1)
            self._greedy = torch.ones(max_batch, dtype=torch.bool, device=device)
            self._seeds = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.seen: Tensor | None = None

    def put(self, row: int, sampling: Sampling, prompt_ids: Tensor) -> None:
        """Give a row its settings; `prompt_ids` int [tokens], without padding, count as seen. No synchronisation.

        The first row with a penalty allocates `seen`, bool [max_batch, vocab_size + 1]: before a variant needs it.
        """
        # From pageable host memory on purpose: the driver takes its own copy of so few bytes before it returns.
        self._settings[row].copy_(torch.tensor(self._packed(sampling), dtype=torch.float64), non_blocking=True)
        self._greedy[row].fill_(sampling.greedy)
        self._seeds[row].fill_(sampling.seed)
        if sampling.repetition_penalty != 1:
            if self.seen is None:
                with torch.inference_mode(False):
                    shape = (len(self._rows), self.vocab_size + 1)  # the last column takes ids that are no outputs
                    self.seen = torch.zeros(shape, dtype=torch.bool, device=self._settings.device)
            ids = prompt_ids.reshape(-1).to(self.seen.device, torch.int64, non_blocking=True)
            self.seen[row].zero_().index_fill_(0, ids.clamp(max=self.vocab_size), True)
        self._rows[row] = sampling

    def clear(self, row: int) -> None:
        """Make a row greedy and without a penalty, so that it asks for no stage."""
        self.put(row, Sampling(), torch.empty(0))

    def variant(self, rows: int) -> Variant:
        """The stages that the first `rows` rows need; the host's own knowledge."""
        used = self._rows[:rows]
        return Variant(any(not own.greedy for own in used), any(own.repetition_penalty != 1 for own in used))

    def sample(self, logits: Tensor, positions: Tensor, variant: Variant) -> Tensor:
        """The next token of rows 0 .. n - 1.

        The same logits, seed and position give the same token in any batch. A row whose logits have a NaN, or no finite
        largest one, gets `argmax`'s token.

        Args:
            logits: [rows, vocab_size], any floating dtype; computed with in fp32.
            positions: int32 or int64 [rows], the counter of the random numbers: a sequence uses each value once.
            variant: of at least these rows, from `variant`.

        Returns:
            int64 [rows].
        """
        scores = self._penalised(logits, variant)
        likeliest = scores.argmax(-1)
        if not variant.sampled:
            return likeliest
        rows = scores.shape[0]
        kept = self._filter(scores)
        number = uniform(self._seeds[:rows], positions)[:, None]
        # Rounding may reach the total itself, which is beyond the last token.
        drawn = torch.minimum((number * kept.mass.double()).long(), kept.mass - 1) + kept.before
        place = torch.searchsorted(kept.cumulative, drawn, right=True).clamp(0, self.vocab_size - 1)
        token = kept.order.gather(1, place).squeeze(1)
        return torch.where(self._greedy[:rows] | ~kept.finite, likeliest, token)

    def probabilities(self, logits: Tensor, variant: Variant) -> Tensor:
        """What `sample` draws from: float64 [rows, vocab_size]; of a greedy row, of logits that are only penalised."""
        kept = self._filter(self._penalised(logits, variant))
        weights = kept.cumulative.diff(dim=1, prepend=torch.zeros_like(kept.before))
        places = torch.arange(self.vocab_size, device=logits.device)
        weights = torch.where(places >= kept.first, weights, 0) / kept.mass.double()
        return torch.empty_like(weights).scatter_(1, kept.order, weights)

    def observe(self, tokens: Tensor, active: Tensor) -> None:
        """Count `tokens` int64 [rows] as seen where `active` bool [rows]; without a row that has a penalty, nothing."""
        if self.seen is not None:
            tokens = torch.where(active, tokens, self.vocab_size)
            self.seen[: len(tokens)].scatter_(1, tokens[:, None], True)

    def _packed(self, sampling: Sampling) -> tuple[float, ...]:
        top_k = min(sampling.top_k or self.vocab_size, self.vocab_size)
        least = math.log(sampling.min_p) if sampling.min_p else -math.inf
        return (sampling.temperature or 1.0, top_k, 1 - sampling.top_p, least, sampling.repetition_penalty)

    def _penalised(self, logits: Tensor, variant: Variant) -> Tensor:
        scores = logits.float()
        if not variant.penalised:
            return scores
        assert self.seen is not None  # `put` allocated it for the row that the variant speaks of
        penalty = self._settings[: len(scores), 4:].float()
        changed = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(self.seen[: len(scores), : self.vocab_size], changed, scores)

    def _filter(self, scores: Tensor) -> _Kept:
        """Temperature, top-k, top-p and min-p of fp32 [rows, vocab_size].

        Sorted upwards, each filter keeps the tokens from some place on and is one look-up. Weights are counted in
        fixed point: sums of integers are exact, so a row's token does not depend on the order in which a device adds
        up. Ties fall as in transformers, which sorts upwards, too.
        """
        temperature, top_k, dropped, least, _ = self._settings[: len(scores), :, None].unbind(1)
        ordered, order = (scores / temperature.float()).sort(dim=-1, stable=True)
        top = ordered[:, -1:]
        bits = 62 - self.vocab_size.bit_length()  # a sum over the vocabulary fits 63 bits
        cumulative = ((ordered - top).exp() * 2.0**bits).long().cumsum(-1)
        total = cumulative[:, -1:]
        kth = ordered.gather(1, self.vocab_size - top_k.long())
        first = torch.searchsorted(ordered, kth)
        before = _before(cumulative, first)
        below = before + (dropped * (total - before).double()).long()
        nucleus = torch.searchsorted(cumulative, below, right=True)
        likely = torch.searchsorted(ordered, (top.double() + least).float())
        first = torch.maximum(torch.maximum(first, nucleus), likely).clamp(max=self.vocab_size - 1)
        before = _before(cumulative, first)
        return _Kept(order, cumulative, first, before, total - before, top.isfinite().squeeze(1))


@dataclass(frozen=True)
class _Kept:
    """Tokens that the filters left, of each row: `order[first:]`."""

    order: Tensor  # int64 [rows, vocab_size], tokens by increasing probability
    cumulative: Tensor  # int64 [rows, vocab_size], their weights added up, in fixed point
    first: Tensor  # int64 [rows, 1], the first place that is kept
    before: Tensor  # int64 [rows, 1], the weight of the places before it
    mass: Tensor  # int64 [rows, 1], the weight that is kept
    finite: Tensor  # bool [rows], whether the largest score is


def _before(cumulative: Tensor, first: Tensor) -> Tensor:
    """The sum of the weights before a place, int64 [rows, 1]."""
    return torch.where(first > 0, cumulative.gather(1, (first - 1).clamp(0, cumulative.shape[1] - 1)), 0)


# By the processors' place in transformers' order.
_READ = {
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", "penalty"),
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
    "LogitNormalization": None,  # moves all logits alike, which the choice of a token does not see
}


def from_transformers(generation_config: Any, logits_processor: Any) -> Sampling:
    """What `model.generate` gives a `custom_generate` callable, as a `Sampling`.

    With `do_sample` the seed is drawn from torch's generator of the CPU, so that `torch.manual_seed` fixes it and two
    calls differ.

    Args:
        generation_config: transformers' GenerationConfig.
        logits_processor: transformers' LogitsProcessorList, or None.

    Raises:
        AlignvecError: a processor, or an order of processors, that is none of `Sampling`'s.
    """
    places, options = list(_READ), dict[str, Any]()
    last = -1
    for processor in logits_processor or ():
        name = type(processor).__name__
        if name not in _READ or not type(processor).__module__.startswith("transformers."):
            raise AlignvecError(f"{name} is not supported by the decoder; leave its option out")
        if places.index(name) <= last:
            raise AlignvecError(f"{name} comes after {places[last]}; pass each once, in transformers' order")
        last = places.index(name)
        if getattr(processor, "min_tokens_to_keep", 1) != 1 and name != "TopKLogitsWarper":  # in whose top_k it is
            raise AlignvecError(f"{name} with min_tokens_to_keep is not supported; leave it at 1")
        if isinstance(getattr(processor, "prompt_ignore_length", None), int):
            raise AlignvecError(f"{name} with prompt_ignore_length is not supported; leave it out")
        if (read := _READ[name]) is not None:
            options[read[0]] = getattr(processor, read[1])
    if not generation_config.do_sample:
        return Sampling(repetition_penalty=options.get("repetition_penalty", 1.0))
    seed = int(torch.randint(1 << 62, (), device="cpu"))
    return Sampling(**{"temperature": 1.0, **options, "seed": seed})
