"""A decode step by the model's own forward: for every architecture, over the whole of the cache under a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignvec.decoding.cache import RowCache, as_transformers
from alignvec.decoding.limits import Reach, reaches
from alignvec.errors import AlignvecError


class ModelForward:
    """tokens int64 [rows] -> logits [rows, vocabulary], with keys and values appended to the cache.

    On a CPU attention reads up to the longest row; on other devices, where nothing may wait for a length, all of
    `max_length`.

    flat: the mask says which places hold tokens, [rows, places], and the model makes its own of it. Models whose
    position bias is made from such a mask need it; it cannot say what windows and chunks leave out.

    Raises:
        AlignvecError: layers whose reach is not known, or with `flat` shorter than the cache.
    """

    def __init__(self, model: Any, cache: RowCache, *, flat: bool = False) -> None:
        self.model, self.cache = model, cache
        found = reaches(model.config.get_text_config(decoder=True))
        # As models take prepared masks: one, or one for each kind of layer.
        self._reaches: dict[str, Reach] | Reach
        if isinstance(found, Reach):
            self._reaches = found.within(cache.max_length)
        else:
            self._reaches = {kind: reach.within(cache.max_length) for kind, reach in found.items()}
        self._flat = flat
        if flat and any(reach != Reach() for reach in self._all):
            raise AlignvecError("its layers look at different tokens, which a mask of places cannot say")
        self._dtype = cache.layers[0][0].dtype

    @property
    def _all(self) -> list[Reach]:
        return [self._reaches] if isinstance(self._reaches, Reach) else list(self._reaches.values())

    def __call__(self, tokens: Tensor) -> Tensor:
        rows = tokens.shape[0]
        lengths = self.cache.lengths[:rows].long()
        span = int(lengths.max()) + 1 if lengths.device.type == "cpu" else self.cache.max_length
        distance = lengths[:, None] - torch.arange(span, device=lengths.device)
        mask: Any
        if self._flat:
            mask = (distance >= 0).long()
        elif isinstance(self._reaches, Reach):
            mask = self._mask(distance, lengths, self._reaches)
        else:
            made = {reach: self._mask(distance, lengths, reach) for reach in self._all}
            mask = {kind: made[reach] for kind, reach in self._reaches.items()}
        logits: Tensor = self.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=lengths[:, None],
            past_key_values=as_transformers(self.cache, rows, span),
            use_cache=True,
        ).logits
        return logits[:, -1]

    def _mask(self, distance: Tensor, lengths: Tensor, reach: Reach) -> Tensor:
        """0 where a row may look, elsewhere the lowest number, [rows, 1, 1, span]: what every implementation adds."""
        seen = distance >= 0
        if reach.window:
            seen &= distance < reach.window
        if reach.chunk:  # chunks are counted from a row's first token
            seen &= distance <= lengths[:, None] % reach.chunk
        return torch.where(seen, 0.0, torch.finfo(self._dtype).min).to(self._dtype)[:, None, None]
