"""Gates for a GPU. Off one, the interpreter runs those that mean something there, and `gpu` ones are skipped."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU is at hand"))


@pytest.fixture
def captured() -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Captures a call in a CUDA graph and gives what replays it and returns its outputs; on a CPU, the call itself."""

    def capture(call: Callable[[], Any]) -> Callable[[], Any]:
        if not torch.cuda.is_available():
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and allocates what stays
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay

    return capture
