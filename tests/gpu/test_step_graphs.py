"""A captured decode step follows the lengths of its rows, which only the device knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignvec import ops
from alignvec.kernels import reference_step
from tests.kernels.cases import BF16, DEVICE, assert_one_rounding, relative_error

Capture = Callable[[Callable[[], Any]], Callable[[], Any]]


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(BF16)


@pytest.mark.parametrize("window", [0, 20], ids=["all", "window"])
def test_one_graph_for_every_length(window: int, captured: Capture) -> None:
    """Appended and attended to, from an empty cache to a full one, rows out of step; then past its end, and anew."""
    rows, heads, kv_heads, size, max_length = 3, 6, 2, 64, 300
    q, k, v = _normal(rows, heads + 2 * kv_heads, size).split((heads, kv_heads, kv_heads), 1)
    cos, sin = _normal(max_length, size), _normal(max_length, size)
    keys, values = (torch.full((rows, kv_heads, max_length, size), torch.nan, device=DEVICE).to(BF16) for _ in "kv")
    lengths = torch.zeros(rows, dtype=torch.int32, device=DEVICE)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        turned = ops.rotary_append(q, k, v, cos, sin, lengths, keys, values, "triton")
        return turned, ops.decode_attention(turned, keys, values, lengths, 0.125, window, "triton")

    replay = captured(step)
    for now in ([0, 0, 0], [1, 2, 0], [299, 130, 64], [299, 131, 65], [400, 0, -1], [0, 1, 2]):
        lengths.copy_(torch.tensor(now))
        at = lengths.clamp(0, max_length - 1)
        for row, length in enumerate(at.tolist()):  # what earlier steps would have filled
            keys[row, :, :length], values[row, :, :length] = _normal(2, kv_heads, length, size)
        turned, y = replay()
        assert_one_rounding(turned, reference_step.rotate(q, cos, sin, at))
        truth = reference_step.decode_attention(turned, keys, values, at, 0.125, window)
        assert relative_error(y, truth) <= 1.5 * relative_error(truth.to(BF16), truth)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16])
def test_long_contexts(rows: int) -> None:
    """Mistral's shape at up to 32,768 positions, in the splits that a GPU takes."""
    keys, values = (_normal(rows, 8, 32768, 128) for _ in range(2))
    lengths = torch.randint(0, 32768, (rows,), dtype=torch.int32, device=DEVICE)
    lengths[-1] = 32767
    q = _normal(rows, 32, 128)
    y, again = (ops.decode_attention(q, keys, values, lengths, 128**-0.5, 0, "triton") for _ in range(2))
    truth = reference_step.decode_attention(q, keys, values, lengths, 128**-0.5, 0)
    assert relative_error(y, truth) <= 1.5 * relative_error(truth.to(BF16), truth)
    assert torch.equal(y, again)


@pytest.mark.gpu
def test_addresses_past_31_bits() -> None:
    """A cache of more than 2^31 numbers: its last row is written and read."""
    rows, kv_heads, max_length, size = 65, 8, 32768, 128
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    keys, values = (torch.zeros(rows, kv_heads, max_length, size, dtype=BF16, device=DEVICE) for _ in "kv")
    keys[-1], values[-1] = _normal(2, kv_heads, max_length, size)
    lengths = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    lengths[-1] = max_length - 1
    q, k, v = _normal(rows, 32, size), _normal(rows, kv_heads, size), _normal(rows, kv_heads, size)
    cos, sin = _normal(max_length, size), _normal(max_length, size)
    turned = ops.rotary_append(q, k, v, cos, sin, lengths, keys, values, "triton")
    assert torch.equal(values[-1, :, -1], v[-1])
    assert_one_rounding(keys[-1, :, -1], reference_step.rotate(k, cos, sin, lengths)[-1])
    y = ops.decode_attention(turned, keys, values, lengths, 0.1, 0, "triton")
    truth = reference_step.decode_attention(turned, keys, values, lengths, 0.1, 0)
    assert relative_error(y[-1], truth[-1]) <= 1.5 * relative_error(truth[-1].to(BF16), truth[-1])
