"""Reading prompts: keys and values of all tokens but the last, which the first decode step takes."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch

from alignvec.coefficients import Coefficients
from alignvec.decoding.cache import KeyValues, RowCache, beginning
from alignvec.decoding.mixes import Values
from alignvec.decoding.prefixes import Prefixes
from alignvec.decoding.rows import Row

TOKENS = 1 << 14  # of one forward pass


@contextlib.contextmanager
def lent(coefficients: Coefficients | None, mixes: Sequence[Values | None], apart: bool = False) -> Iterator[None]:
    """Forward passes within use these mixes, one a row; one for all where they are alike.

    apart: not even then: what is captured within will be replayed when they are not.
    """
    if coefficients is None or mixes[0] is None:
        yield
        return
    rows = [mix for mix in mixes if mix is not None]
    with coefficients.lent(rows if apart or len(set(rows)) > 1 else rows[:1], len(rows)):
        yield


class Prefill:
    """Runs a model's own forward over prompts, and keeps what the cache of prefixes has room for.

    Prompts are padded on the right, where a causal model cannot see: what lies behind a row's end is masked in the
    cache, and overwritten as the row grows.
    """

    def __init__(self, model: Any, cache: RowCache, prefixes: Prefixes) -> None:
        self.model, self.cache, self.prefixes = model, cache, prefixes

    def read(
        self,
        rows: Sequence[Row],
        mixes: Mapping[int, Values | None],
        weights: Hashable,
        coefficients: Coefficients | None,
    ) -> None:
        """Write the cache of these rows anew.

        mixes: of each row, by its index. weights: what the keys and values depend on besides the mix.
        """
        groups: dict[int, list[tuple[Row, KeyValues]]] = {}
        for row in rows:
            row.written = None  # until all of it is
            known, states = self.prefixes.find(row.text[:-1], (weights, mixes[row.index]))
            groups.setdefault(known, []).append((row, states))
        for known, group in groups.items():
            group.sort(key=lambda item: len(item[0].text))
            while group:
                rest = max(1, len(group[-1][0].text) - 1 - known)
                some = [group.pop() for _ in range(min(len(group), max(1, TOKENS // rest)))]
                with lent(coefficients, [mixes[row.index] for row, _ in some]):
                    self._forward(known, some)
                for row, _ in some:
                    row.written = (weights, mixes[row.index])
        for row in rows:
            self.keep(row)

    def _forward(self, known: int, group: Sequence[tuple[Row, KeyValues]]) -> None:
        device = self.cache.lengths.device
        prompts = [row.text[known:-1] for row, _ in group]
        longest = max(map(len, prompts))
        cache = beginning([states for _, states in group], known)
        if longest:
            ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
            for own, prompt in zip(ids, prompts, strict=True):
                own[: len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
            positions = torch.arange(known, known + longest, device=device).expand(len(prompts), -1)
            self.model.base_model(
                input_ids=ids.to(device), position_ids=positions, past_key_values=cache, use_cache=True
            )
        for number, ((row, _), prompt) in enumerate(zip(group, prompts, strict=True)):
            if known or longest:
                self.cache.store(row.index, cache, number, known + len(prompt))
            else:
                self.cache.lengths[row.index] = 0

    def keep(self, row: Row) -> None:
        """Remember the keys and values of a row, if one mix has written all of them."""
        tokens = row.text[:-1]
        room = self.cache.nbytes // (self.cache.max_batch * self.cache.max_length) * len(tokens)
        if row.written is not None and 0 < room <= self.prefixes.capacity:
            self.prefixes.keep(tokens, row.written, self.cache.read(row.index, len(tokens)))
