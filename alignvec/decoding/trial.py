"""Whether a decode step computes what the model's own forward does: found by running both, near and far.

Near: prompts of a few tokens that the model has read. Far: the last token that a row has room for, after random keys
and values instead of a text: windows, chunks and whatever else sets in at some length show, at the cost of a few steps
of one token. What a length changes by less than rounding is not seen, nor what becomes of keys that were written
before it: that is read from the configuration (`limits.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from alignvec.coefficients import Coefficients
from alignvec.decoding.cache import RowCache, states
from alignvec.decoding.mixes import Values
from alignvec.decoding.prefill import lent
from alignvec.decoding.step import Forward
from alignvec.errors import AlignvecError

LENGTHS = (5, 3)  # tokens before the one that is tried, of two rows
_BEYOND = 2  # places behind the longest row, which must not be seen
_SLACK = {torch.float16: 3e-2, torch.bfloat16: 1e-1}  # of logits; another function is off by all of it
_LEAST_SLACK = 1e-3
_SCALES = (1.0, *(2.0**-places for places in range(8, 136, 8)), 1.0)  # of coefficients


class OwnForwardError(AlignvecError):
    """The model fails by itself, whatever a decoder does."""


class Trial:
    """One row or two, whose logits by the model's own forward, a row at a time, any step has to give.

    rows: 1, or 2 of different lengths. apart: under mixes of their own, not under one. room: most tokens of a row.
    prompted: keys and values of the near rows, as the model writes them.

    Raises:
        OwnForwardError: the model itself fails on these tokens.
        AlignvecError: it refuses the mixes, or writes its keys and values elsewhere than to the cache it is given.
    """

    def __init__(self, model: Any, coefficients: Coefficients | None, rows: int, apart: bool, room: int) -> None:
        self.model, self._coefficients = model, coefficients
        self._lengths = LENGTHS[:rows]
        last = room - 1
        self._far = (last, last // 2)[:rows] if last > max(LENGTHS) else ()
        self._ids = _tokens(model, rows)
        for scale in _SCALES:  # down to where the logits are finite
            self._mixes = _mixes(coefficients, rows, apart, scale)
            self._wanted = [
                self._own(mix, self._ids[row : row + 1, : length + 1], None)
                for row, (length, mix) in enumerate(zip(self._lengths, self._mixes, strict=True))
            ]
            if coefficients is None or all(bool(own.isfinite().all()) for own in self._wanted):
                break
        self.prompted = DynamicCache()
        with lent(coefficients, self._mixes):
            model.base_model(input_ids=self._ids[:, :-1], past_key_values=self.prompted, use_cache=True)
        if not self.prompted.layers or any(keys is None for keys, _ in states(self.prompted)):
            raise AlignvecError(
                f"{type(model).__name__} does not write its keys and values to the cache that it is given, which a "
                "decoder goes on from; use model.generate"
            )
        self._wanted_far: list[Tensor] = []

    def differs(self, build: Callable[[RowCache], Forward]) -> str | None:
        """None, or a clause that says where the step that `build` makes computes other logits than the model.

        Raises:
            OwnForwardError: the model itself fails at as many tokens as a row has room for.
        """
        cache = RowCache(self.prompted, len(self._lengths), max(self._lengths) + 1 + _BEYOND)
        for row, length in enumerate(self._lengths):
            cache.store(row, self.prompted, row, length)
        last = torch.stack([own[length] for own, length in zip(self._ids, self._lengths, strict=True)])
        error = self._error(build, cache, last, self._wanted)
        where = ""
        if error is None and self._far:
            cache = self._random()
            if not self._wanted_far:
                past = enumerate(zip(self._far, self._mixes, strict=True))
                self._wanted_far = [self._own(mix, last[row, None, None], _past(cache, row)) for row, (_, mix) in past]
            error = self._error(build, cache, last, self._wanted_far)
            where = f" at {self._far[0]} tokens"
        if error is None:
            return None
        return f"its logits differ from those of the model's own forward by {error:.0%}{where}"

    def _own(self, mix: Values | None, ids: Tensor, past: Cache | None) -> Tensor:
        """The model's own logits of the last of ids [1, tokens], float32 [vocabulary]."""
        length = ids.shape[1] + (0 if past is None else past.get_seq_length())
        options: dict[str, Any] = {"use_cache": False}
        if past is not None:
            mask = torch.ones(1, length, dtype=torch.int64, device=ids.device)
            options = {"use_cache": True, "past_key_values": past, "attention_mask": mask}
        try:
            with lent(self._coefficients, [mix]):
                logits: Tensor = self.model(input_ids=ids, **options).logits
        except AlignvecError:
            raise
        except Exception as error:  # whatever a model's code raises
            advice = "" if past is None else "; make the decoder with a smaller max_length"
            raise OwnForwardError(
                f"{type(self.model).__name__} itself fails at {length} tokens: {error}{advice}"
            ) from error
        return logits[0, -1].float()

    def _error(
        self, build: Callable[[RowCache], Forward], cache: RowCache, last: Tensor, wanted: Sequence[Tensor]
    ) -> float | None:
        """The relative error of a step's logits where it is more than rounding."""
        with lent(self._coefficients, self._mixes):
            got = build(cache)(last).float()
        truth = torch.stack(list(wanted))
        lost = ~(truth.isfinite() | got.isfinite())  # in both alike
        truth, got = truth.masked_fill(lost, 0), got.masked_fill(lost, 0)
        truth, got = truth - truth.mean(-1, keepdim=True), got - got.mean(-1, keepdim=True)
        error = float(((got - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=1e-30)).max())
        return None if error <= _SLACK.get(cache.layers[0][0].dtype, _LEAST_SLACK) else error

    def _random(self) -> RowCache:
        """A cache filled up to the far lengths, one memory for layers of one shape where no layer reads another's.

        Keys are random. Values are alike where the distance to the end has as many binary digits, so that a mean over
        other tokens is another one however many they are. What lies behind a row's end is large.
        """
        layers = getattr(self.model.config.get_text_config(decoder=True), "num_hidden_layers", None)
        shared = layers == len(self.prompted.layers)
        cache = RowCache(self.prompted, len(self._far), self._far[0] + 1 + _BEYOND, shared=shared)
        device = cache.lengths.device
        generator = torch.Generator(device).manual_seed(1)
        seen = set()
        for (keys, values), own in zip(cache.layers, states(self.prompted), strict=True):
            if keys.data_ptr() in seen:
                continue
            seen.add(keys.data_ptr())
            key_size, value_size = (float(each.double().pow(2).mean().sqrt()) for each in own)
            keys.copy_(torch.randn(keys.shape, generator=generator, device=device) * key_size)
            shape = values.shape[1], 64, values.shape[3]
            distinct = torch.randn(shape, generator=generator, device=device).to(values) * value_size
            for row, length in enumerate(self._far):
                distance = torch.arange(length, 0, -1, device=device)
                values[row, :, :length] = distinct[:, distance.log2().long()]
                keys[row, :, length:], values[row, :, length:] = 10 * key_size, 10 * value_size
        cache.lengths.copy_(torch.tensor(self._far))
        return cache


class _Past(DynamicLayer):
    """A past that a step looks at and leaves as it is."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def _past(cache: RowCache, row: int) -> Cache:
    """What a row holds, as a model's own cache without room for more."""
    length = int(cache.lengths[row])
    return Cache(
        layers=[_Past(keys[row, None, :, :length], values[row, None, :, :length]) for keys, values in cache.layers]
    )


def _tokens(model: Any, rows: int) -> Tensor:
    """Token ids, int64 [rows, tokens]."""
    generator = torch.Generator().manual_seed(0)
    size = min(model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0])
    ids = torch.randint(size, (len(LENGTHS), max(LENGTHS) + 1), generator=generator)[:rows]
    return ids.to(model.get_input_embeddings().weight.device)


def _mixes(coefficients: Coefficients | None, rows: int, apart: bool, scale: float) -> list[Values | None]:
    if coefficients is None:
        return [None] * rows
    count = len(coefficients.names)
    return [(0.0 if apart and row % 2 else scale,) * count for row in range(rows)]
