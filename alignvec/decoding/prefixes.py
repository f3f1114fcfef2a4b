"""Prompts that were read before: keys and values by their tokens and by the mix that they were written under."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from alignvec.decoding.cache import KeyValues

LEAST = 16  # tokens that are worth a copy


@dataclass(frozen=True)
class _Kept:
    tokens: NDArray[numpy.int64]
    states: KeyValues
    nbytes: int


class Prefixes:
    """At most `capacity` bytes of keys and values, the least recently used given up first.

    A key or a value depends on all tokens up to it and on the weights that made it: under another mix the same tokens
    have others, so the mix is part of what is looked up.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.hits = 0  # tokens that did not have to be computed
        self._kept: OrderedDict[tuple[Hashable, bytes], _Kept] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept.values())

    def find(self, tokens: Sequence[int], mix: Hashable) -> tuple[int, KeyValues]:
        """How many of the first tokens are known under this mix, and keys and values of at least so many."""
        wanted = numpy.asarray(tokens, dtype=numpy.int64)
        best, where = 0, None
        for key, kept in self._kept.items():
            if key[0] == mix:
                size = min(len(wanted), len(kept.tokens))
                differ = numpy.flatnonzero(wanted[:size] != kept.tokens[:size])
                common = int(differ[0]) if len(differ) else size
                if common > best:
                    best, where = common, key
        if where is None or best < LEAST:
            return 0, []
        self._kept.move_to_end(where)
        self.hits += best
        return best, self._kept[where].states

    def keep(self, tokens: Sequence[int], mix: Hashable, states: KeyValues) -> None:
        """Keep the keys and values of these tokens; what they continue is given up for them."""
        nbytes = sum(keys.nbytes + values.nbytes for keys, values in states)
        if nbytes > self.capacity or len(tokens) < LEAST:
            return
        own = numpy.asarray(tokens, dtype=numpy.int64)
        for key, kept in list(self._kept.items()):
            size = len(kept.tokens)
            if key[0] == mix and size <= len(own) and (kept.tokens == own[:size]).all():
                del self._kept[key]
        while self._kept and self.nbytes + nbytes > self.capacity:
            self._kept.popitem(last=False)
        self._kept[mix, own.tobytes()] = _Kept(own, states, nbytes)

    def clear(self) -> None:
        self._kept.clear()
