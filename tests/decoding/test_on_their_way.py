"""Steps that are on their way when a decoder reads a text anew, or the user forgets or changes something."""

from __future__ import annotations

import pytest
import torch

import alignvec
from tests.models import random_vector, tiny

PROMPT = list(range(3, 33))


@pytest.fixture
def alignment() -> alignvec.Alignment:
    model = tiny(num_hidden_layers=1)
    return alignvec.attach(model, {"v": random_vector(model, 1, 0.3)})


def test_tokens_of_steps_before_a_recomputation_are_collected(alignment: alignvec.Alignment) -> None:
    schedule = [{"v": 1.0}, {"v": -1.0}, {"v": 0.5}, {}]
    one = alignment.decoder(max_length=64)
    row = one.join(PROMPT, schedule, recompute=True)
    wanted = [one.step()[row] for _ in schedule]
    ahead = alignment.decoder(max_length=64)
    row = ahead.join(PROMPT, schedule, recompute=True)
    got = []
    ahead.launch()
    for _ in schedule[1:]:
        ahead.launch()
        assert ahead.pending == 2
        got.append(ahead.collect()[row])
    got.append(ahead.collect()[row])
    assert got == wanted == ahead.text(row)[len(PROMPT) :]


def test_tokens_of_steps_before_another_sampling_are_collected(alignment: alignvec.Alignment) -> None:
    decoder = alignment.decoder(max_length=64)
    row = decoder.join(PROMPT)
    decoder.launch()
    decoder.set_sampling(row, alignvec.Sampling(temperature=1.0))
    assert decoder.pending == 1
    assert decoder.collect() == {row: decoder.text(row)[-1]}
    assert len(decoder.text(row)) == len(PROMPT) + 1


@torch.no_grad()
def test_what_a_row_wrote_before_forget_is_not_kept(alignment: alignvec.Alignment) -> None:
    decoder = alignment.decoder(max_length=64, prefix_bytes=1 << 22)
    row = decoder.join(PROMPT)
    for parameter in alignment.model.parameters():
        parameter.mul_(1.3)
    decoder.forget()
    decoder.leave(row)
    assert decoder.prefixes.nbytes == 0
    ids = torch.tensor([[*PROMPT, 5]])
    wanted = alignment.decoder(max_length=64).generate(ids, max_new_tokens=6)
    assert decoder.generate(ids, max_new_tokens=6).tolist() == wanted.tolist()
