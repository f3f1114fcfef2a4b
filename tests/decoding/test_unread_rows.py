"""A row at coefficient 0 decodes beside one whose products overflow, as it does beside a vector of ordinary size."""

from __future__ import annotations

import pytest
import torch

import alignvec
from alignvec import AlignmentVector
from alignvec.planner import backends
from tests.decoding.truth import Truth
from tests.models import random_vector, tiny

PROMPT, SHORT = list(range(3, 14)), list(range(3, 8))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("architecture", ["Mistral", "GPT2"])
def test_a_row_at_0_beside_infinity(architecture: str, backend: str) -> None:
    if (reason := backends.obstacle("cpu", backend)) is not None:
        pytest.skip(reason)
    model = tiny(architecture, num_hidden_layers=1)
    tame = random_vector(model, 1, base=False)
    huge = AlignmentVector({name: torch.where(tame[name] < 0, -3e38, 3e38) for name in tame.names})
    vectors = {"huge": huge, "other": random_vector(model, 2, 0.3, base=False)}
    mix = {"huge": 0.0, "other": 0.5}
    truth = Truth(model, vectors)
    decoder = alignvec.attach(model, vectors, backend=backend).decoder(max_length=48, max_batch=3)
    rows = [
        decoder.join(PROMPT, mix=mix, max_new_tokens=6),
        decoder.join(PROMPT, mix={"huge": 1.0}, max_new_tokens=6),
        decoder.join(SHORT, mix={}, max_new_tokens=6),
    ]
    steps = [decoder.step() for _ in range(5)]
    assert [step[rows[0]] for step in steps] == truth.answer(PROMPT, [mix] * 5)
    assert [step[rows[2]] for step in steps] == truth.answer(SHORT, [{}] * 5)
