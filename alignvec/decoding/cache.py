"""Keys and values of the rows of a decoder, at addresses that never change, and a prompt's on the way there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

KeyValues = list[tuple[Tensor, Tensor]]  # of one row, a layer each: [kv_heads, tokens, head_dim]


class RowCache:
    """Room for `max_length` tokens in each of `max_batch` rows. A row begins at position 0, without padding.

    layers: keys and values of each layer, [max_batch, kv_heads, max_length, head_dim].
    lengths: int32 [max_batch] on the device, tokens of each row that have been written: where the next goes.
    shared: layers of one shape have the same memory, which holds for the length of a step that is only tried.
    """

    def __init__(self, like: Cache, max_batch: int, max_length: int, *, shared: bool = False) -> None:
        self.max_batch, self.max_length = max_batch, max_length
        self.layers: KeyValues = []
        made: dict[object, tuple[Tensor, Tensor]] = {}
        for number, (keys, values) in enumerate(states(like)):
            shape = (keys.shape[1], keys.shape[3], values.shape[1], values.shape[3]) if shared else number
            if shape not in made:
                # Zeros: what was never written is masked, and must not be NaN where a mask is a large negative number.
                made[shape] = (
                    keys.new_zeros(max_batch, keys.shape[1], max_length, keys.shape[3]),
                    values.new_zeros(max_batch, values.shape[1], max_length, values.shape[3]),
                )
            self.layers.append(made[shape])
        self.lengths = torch.zeros(max_batch, dtype=torch.int32, device=self.layers[0][0].device)

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def store(self, row: int, cache: Cache, number: int, tokens: int) -> None:
        """Make the first `tokens` of sequence `number` of a prompt's cache those of `row`."""
        for (keys, values), (own_keys, own_values) in zip(self.layers, states(cache), strict=True):
            keys[row, :, :tokens].copy_(own_keys[number, :, :tokens])
            values[row, :, :tokens].copy_(own_values[number, :, :tokens])
        self.lengths[row] = tokens

    def read(self, row: int, tokens: int) -> KeyValues:
        """A copy of the first `tokens` of a row."""
        return [(keys[row, :, :tokens].clone(), values[row, :, :tokens].clone()) for keys, values in self.layers]


def states(cache: Cache) -> KeyValues:
    """Keys and values of every layer, [batch, kv_heads, tokens, head_dim]."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def beginning(prefixes: Sequence[KeyValues], tokens: int) -> DynamicCache:
    """A cache that holds the first `tokens` of several rows: where their prompts go on."""
    cache = DynamicCache()
    if tokens:
        for number, layer in enumerate(zip(*prefixes, strict=True)):
            keys = torch.stack([own[:, :tokens] for own, _ in layer])
            cache.update(keys, torch.stack([own[:, :tokens] for _, own in layer]), number)
    return cache


class _RowLayer(CacheLayerMixin):
    """One layer of the rows 0 to n - 1, as a model's own forward sees it: a token is written where its row ends."""

    is_compileable = True  # its shapes do not follow the rows, so a mask may not be left out

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._at = at
        self._rows = torch.arange(keys.shape[0], device=keys.device)

    def lazy_initialization(self, *_: Any) -> None:
        return

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys[self._rows, :, self._at] = key_states[:, :, 0]
        self.values[self._rows, :, self._at] = value_states[:, :, 0]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        """Tokens before this one in the longest row that there can be; on a CPU, in the longest that there is."""
        return self.get_max_length() - 1

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[-2]

    def get_max_cache_shape(self) -> int:  # its name before transformers 5.20
        return self.get_max_length()


def as_transformers(cache: RowCache, rows: int, span: int) -> Cache:
    """The rows 0 to `rows` - 1 as a model's forward takes them, up to `span` positions."""
    at = cache.lengths[:rows].long().clamp(max=span - 1)
    return Cache(
        layers=[_RowLayer(keys[:rows, :, :span], values[:rows, :, :span], at) for keys, values in cache.layers]
    )
