"""One decode step for all rows, from their last tokens to their next ones: without a wait, and as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignvec.decoding.cache import RowCache
from alignvec.decoding.sampling import Sampler, Variant

MAX_POLICIES = 8

Forward = Callable[[Tensor], Tensor]  # tokens [rows] -> logits [rows, vocabulary]


@dataclass(frozen=True)
class Kind:
    """What a step is compiled for; all else is device data. A graph is captured for each kind that occurs.

    rows: how many rows of the decoder take part, from row 0 on. policies: the most rows whose logits are added up.
    """

    rows: int
    policies: int
    sampling: Variant


class State:
    """What a step reads and writes, on the device, at addresses that never change.

    tokens: int64 [max_batch], each row's last token, whose keys and values are not in the cache yet.
    active: int32 [max_batch], 1 for rows that go on, 0 for free ones and those at their end.
    members: int64 [max_batch, MAX_POLICIES], the rows whose logits make up a row's, itself if it stands alone; the
        first of them says which token all of them take. weights: float32, of the same shape.
    """

    def __init__(self, cache: RowCache, sampler: Sampler) -> None:
        self.cache, self.sampler = cache, sampler
        device, rows = cache.lengths.device, cache.max_batch
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.active = torch.zeros(rows, dtype=torch.int32, device=device)
        self.members = torch.arange(rows, device=device)[:, None].repeat(1, MAX_POLICIES)
        self.weights = torch.zeros(rows, MAX_POLICIES, device=device)
        self.weights[:, 0] = 1

    def group(self, rows: Sequence[int], weights: Sequence[float]) -> None:
        """Let these rows decode together, by the sum of their logits with these weights."""
        for row in rows:
            self.members[row] = row  # where a weight is 0, a member must not be another's NaN
            self.members[row, : len(rows)] = torch.tensor(rows)
            self.weights[row] = 0
            self.weights[row, : len(rows)] = torch.tensor(weights, dtype=torch.float32)

    def step(self, forward: Forward, kind: Kind) -> None:
        """Device data only: tokens, lengths and what was seen go on by one token in every active row."""
        n, p = kind.rows, kind.policies
        logits = forward(self.tokens[:n]).float()
        if p > 1:
            logits = (logits[self.members[:n, :p]] * self.weights[:n, :p, None]).sum(1)
        lengths, active = self.cache.lengths[:n], self.active[:n]
        tokens = self.sampler.sample(logits, lengths, kind.sampling)
        if p > 1:
            tokens = tokens[self.members[:n, 0]]
        if kind.sampling.penalised:
            self.sampler.observe(tokens, active > 0)
        self.tokens[:n].copy_(torch.where(active > 0, tokens, self.tokens[:n]))
        lengths += active

    @property
    def written(self) -> list[Tensor]:
        """What a step changes, other than the cache behind a row's end."""
        seen = self.sampler.seen
        return [self.tokens, self.cache.lengths, *(() if seen is None else (seen,))]


class Graphs:
    """CUDA graphs of steps, one a kind, that share their memory."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._graphs: dict[Kind, torch.cuda.CUDAGraph] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()

    def step(self, forward: Forward, kind: Kind) -> None:
        graph = self._graphs.get(kind)
        if graph is None:
            graph = self._graphs[kind] = self._capture(forward, kind)
        graph.replay()

    def _capture(self, forward: Forward, kind: Kind) -> torch.cuda.CUDAGraph:
        device = self._state.tokens.device
        kept = [tensor.clone() for tensor in self._state.written]
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # compiles what is to be captured
            for _ in range(2):
                self._state.step(forward, kind)
                for tensor, before in zip(self._state.written, kept, strict=True):
                    tensor.copy_(before)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=self._pool):
            self._state.step(forward, kind)
        return graph


class Output:
    """The tokens of a step on their way to the host."""

    def __init__(self, tokens: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tokens.device))
        else:
            self._tokens = tokens.clone()

    def wait(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        tokens: list[int] = self._tokens.tolist()
        return tokens
