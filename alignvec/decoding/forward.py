"""A decode step by the model's own forward: for every architecture, over the whole of the cache under a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignvec.decoding.cache import RowCache, as_transformers


class ModelForward:
    """tokens int64 [rows] -> logits [rows, vocabulary], with keys and values appended to the cache.

    On a CPU attention reads up to the longest row; on other devices, where nothing may wait for a length, all of
    `max_length`.
    """

    def __init__(self, model: Any, cache: RowCache) -> None:
        self.model, self.cache = model, cache
        config = model.config.get_text_config()
        types = getattr(config, "layer_types", None)
        window = int(getattr(config, "sliding_window", None) or 0)
        # As models take prepared masks: one, or one for each kind of layer.
        self._windows = {kind: window if kind == "sliding_attention" else 0 for kind in types} if types else None
        self._window = window
        self._dtype = cache.layers[0][0].dtype

    def __call__(self, tokens: Tensor) -> Tensor:
        rows = tokens.shape[0]
        lengths = self.cache.lengths[:rows]
        span = int(lengths.max()) + 1 if lengths.device.type == "cpu" else self.cache.max_length
        distance = lengths[:, None] - torch.arange(span, device=lengths.device)
        mask: Any
        if self._windows is None:
            mask = self._mask(distance, self._window)
        else:
            mask = {kind: self._mask(distance, window) for kind, window in self._windows.items()}
        logits: Tensor = self.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=lengths[:, None].long(),
            past_key_values=as_transformers(self.cache, rows, span),
            use_cache=True,
        ).logits
        return logits[:, -1]

    def _mask(self, distance: Tensor, window: int) -> Tensor:
        """0 where a row may look, elsewhere the lowest number, [rows, 1, 1, span]: what every implementation adds."""
        seen = distance >= 0
        if window:
            seen &= distance < window
        return torch.where(seen, 0.0, torch.finfo(self._dtype).min).to(self._dtype)[:, None, None]
