"""What merges in float64 say that a decoder has to answer, and to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from alignvec import AlignmentVector
from alignvec.decoding.cache import KeyValues, states
from tests.models import merged

Mix = Mapping[str, float]


class Truth:
    """Merges of one model, each made once. model: without vectors attached."""

    def __init__(self, model: nn.Module, vectors: dict[str, AlignmentVector]) -> None:
        self._base, self._vectors = merged(model, vectors, {}), vectors
        self._models: dict[tuple[tuple[str, float], ...], nn.Module] = {}
        self._logits: dict[object, Tensor] = {}

    def model(self, mix: Mix) -> nn.Module:
        key = tuple(sorted((name, value) for name, value in mix.items() if value))
        if key not in self._models:
            self._models[key] = merged(self._base, self._vectors, dict(key))
        return self._models[key]

    @torch.no_grad()
    def answer(self, ids: Sequence[int], mixes: Sequence[Mix], read: Mix | None = None) -> list[int]:
        """Greedy tokens, one under each mix, over keys and values as they were written: the prompt's by `read`."""
        cache, token, answer = DynamicCache(), ids[-1], []
        self.model(mixes[0] if read is None else read)(torch.tensor([ids[:-1]]), past_key_values=cache)
        for mix in mixes:
            logits = self.model(mix)(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            token = int(logits.argmax())
            answer.append(token)
        return answer

    @torch.no_grad()
    def likely(self, mix: Mix, ids: Sequence[int], token: int, slack: float = 1e-3) -> bool:
        """Whether a token is the likeliest after these, but for rounding."""
        key = tuple(sorted(mix.items())), tuple(ids)
        if key not in self._logits:
            self._logits[key] = self.model(mix)(torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits = self._logits[key]
        return bool(logits[token] >= logits.max() - slack)

    @torch.no_grad()
    def error(self, mix: Mix, tokens: Sequence[int], kept: KeyValues) -> float:
        """The relative error of keys and values [kv_heads, tokens, head_dim] that this mix is said to have written."""
        cache = DynamicCache()
        self.model(mix)(torch.tensor([list(tokens)]), past_key_values=cache)
        pairs = [
            (own, true[0])
            for layer, whole in zip(kept, states(cache), strict=True)
            for own, true in zip(layer, whole, strict=True)
        ]
        return max(float((own.double() - true).norm() / true.norm()) for own, true in pairs)
