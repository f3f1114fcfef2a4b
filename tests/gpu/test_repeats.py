"""The same launch gives the same bits every time, on any stream."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alignvec.kernels import embedding, linear, materialise
from alignvec.kernels.configs import Config
from tests.kernels.cases import DEVICE, SPLIT_3, TILE, Case

REPEATS = 50 if DEVICE == "cuda" else 3


def launches(format: str) -> dict[str, Callable[[], Tensor]]:
    args = Case(12, 70, 300, 3, rows=4, bias=True, format=format).make()
    _, weight, _, vectors, _, columns, table, rows, _ = args
    ids = torch.arange(12, device=DEVICE) % 70
    one = torch.ones_like(rows)

    def mix() -> Tensor:
        return materialise.materialise(weight, vectors, columns, table, one, out=torch.empty_like(weight))

    return {
        "split": lambda: linear.linear(*args, execution="split", config=TILE),
        "split_k": lambda: linear.linear(*args, execution="split", config=SPLIT_3),
        "combine": lambda: linear.linear(*args, execution="combine", config=TILE),
        "embedding": lambda: embedding.embedding(ids, weight, vectors, columns, table, rows),
        "materialise": mix,
    }


@pytest.mark.parametrize("name", ["split", "split_k", "combine", "embedding", "materialise"])
@pytest.mark.parametrize("format", ["dense", "mixed"])
def test_repeated(format: str, name: str) -> None:
    run = launches(format)[name]
    first = run()
    assert first.isfinite().all()
    assert all(torch.equal(first, run()) for _ in range(REPEATS))


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["dense", "mixed"])
def test_two_streams(format: str) -> None:
    """Launches of two layers, each on a stream of its own and with coefficients of its own, do not meet."""
    configs = (Config(16, 64, 64, 4, 3, split_k=4), Config(16, 32, 64, 4, 2, split_k=2))
    layers = [Case(16, 4096, 4096, 3, rows=4, format=format).make(seed) for seed in (1, 2)]
    alone = [linear.linear(*args, execution="split", config=c) for args, c in zip(layers, configs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    results: list[list[Tensor]] = [[], []]
    for _ in range(REPEATS):
        for stream, args, config, own in zip(streams, layers, configs, results, strict=True):
            with torch.cuda.stream(stream):
                own.append(linear.linear(*args, execution="split", config=config))
    torch.cuda.synchronize()
    for expected, own in zip(alone, results, strict=True):
        assert all(torch.equal(expected, y) for y in own)
