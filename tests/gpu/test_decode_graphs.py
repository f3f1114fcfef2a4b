"""A decoder's steps as CUDA graphs: captured once a kind, and right for every row, mix and setting that comes later."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import alignvec
from alignvec import Decoder, Sampling
from alignvec.planner import backends
from tests.models import random_vector, tiny

pytestmark = pytest.mark.gpu
NEW = 10
MIXES = [{"a": 0.7, "b": -0.4}, {"a": -1.0}, {"b": 1.3, "a": 0.1}]


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = backends.obstacle("cuda", request.param)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def alignment(request: pytest.FixtureRequest, backend: str) -> alignvec.Alignment:
    model = tiny(hidden_size=128, head_dim=32, intermediate_size=256).to("cuda", request.param)
    return alignvec.attach(model, {"a": random_vector(model, 1), "b": random_vector(model, 2)}, backend=backend)


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def likely(alignment: alignvec.Alignment, text: list[int], mix: dict[str, float]) -> None:
    """Every generated token is one of the likeliest by a forward pass over the whole text, but for rounding."""
    with alignment.using(mix), torch.no_grad():
        logits = alignment.model(torch.tensor([text], device="cuda"), use_cache=False).logits[0, -NEW - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(text[-NEW:], device="cuda")[:, None]).squeeze(1)
    slack = 1e-3 if alignment.model.dtype == torch.float32 else 0.1
    assert (chosen >= logits.max(-1).values - slack * logits.std()).all()


def graphs(decoder: Decoder) -> int:
    ((_, captured),) = decoder._runner._programs.values()
    assert captured is not None
    return len(captured._graphs)


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "own forward"])
def test_rows_come_go_and_change_without_another_capture(alignment: alignvec.Alignment, fuse: bool) -> None:
    decoder = alignment.decoder(max_batch=4, max_length=64, fuse=fuse)
    for turn in range(3):
        rows = {}
        for number, mix in enumerate(MIXES):
            rows[decoder.join(prompt(10 * turn + number, 3 + 4 * number), mix, max_new_tokens=NEW)] = mix
        while decoder.going:
            decoder.step()
        for row, mix in rows.items():
            likely(alignment, decoder.text(row), mix)
            decoder.leave(row)
    assert graphs(decoder) == 1, "three rows are one kind of step: a graph of four"
    alignment.set(a=0.5)
    row = decoder.join(prompt(5, 5), max_new_tokens=NEW, recompute=True)
    for step in range(NEW):
        alignment.set(a=0.5 if step < 4 else -1.0)
        decoder.step()
    assert len(decoder.text(row)) == 5 + NEW
    assert graphs(decoder) == 2


def test_steps_run_ahead_of_the_host(alignment: alignvec.Alignment) -> None:
    decoder = alignment.decoder(max_batch=2, max_length=64)
    row = decoder.join(prompt(0, 7), {"a": 1.0}, max_new_tokens=NEW)
    for _ in range(NEW):
        decoder.launch()
    while decoder.pending:
        decoder.collect()
    likely(alignment, decoder.text(row), {"a": 1.0})


def test_schedules_follow_replay_by_replay(alignment: alignvec.Alignment) -> None:
    """Mixes written between replays that the host does not wait for arrive in the right step."""
    schedule = [{"a": 1.0}, {"b": -1.0}, {"a": -0.5, "b": 0.5}]

    def texts(graphs: bool) -> list[list[int]]:
        decoder = alignment.decoder(max_batch=2, max_length=64, graphs=graphs)
        rows = [
            decoder.join(prompt(1, 6), lambda token: schedule[token % 3], max_new_tokens=NEW),
            decoder.join(prompt(2, 9), {"b": 0.3}, max_new_tokens=NEW),
        ]
        while decoder.going:
            decoder.launch()
        while decoder.pending:
            decoder.collect()
        return [decoder.text(row) for row in rows]

    assert texts(True) == texts(False)


def test_sampling_is_that_without_graphs(alignment: alignvec.Alignment) -> None:
    settings = [
        Sampling(temperature=1.0, top_k=20, seed=1),
        Sampling(temperature=0.7, top_p=0.9, min_p=0.02, repetition_penalty=1.3, seed=2),
        Sampling(),
    ]

    def texts(graphs: bool) -> list[list[int]]:
        decoder = alignment.decoder(max_batch=4, max_length=64, graphs=graphs)
        rows = [decoder.join(prompt(3, 6), MIXES[0], sampling=own, max_new_tokens=NEW) for own in settings]
        while decoder.going:
            decoder.step()
        return [decoder.text(row) for row in rows]

    assert texts(True) == texts(False)


def test_a_blend_and_a_materialised_mix(alignment: alignvec.Alignment) -> None:
    decoder = alignment.decoder(max_batch=4, max_length=64)
    ids = torch.tensor([prompt(4, 6)], device="cuda")
    options = {"max_new_tokens": NEW, "eos_token_id": -1}
    blended = decoder.generate(ids, blend=[(MIXES[0], 1.0), (MIXES[1], 0.0)], **options)
    assert torch.equal(blended, decoder.generate(ids, mixes=[MIXES[0]], **options))
    alignment.materialise(MIXES[1])
    expected = alignment.model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    got = decoder.generate(ids, **options)
    assert alignment.model.dtype != torch.float32 or torch.equal(got, expected)
    alignment.restore()
    assert torch.equal(blended, decoder.generate(ids, mixes=[MIXES[0]], **options))


def test_greedy_tokens_are_those_of_generate(alignment: alignvec.Alignment) -> None:
    if alignment.model.dtype != torch.float32:
        pytest.skip("roundings differ, and so may tokens")
    ids = torch.tensor([prompt(6, 9), [0, 0, 0, *prompt(7, 6)]], device="cuda")
    mask = F.pad(torch.ones(2, 6, dtype=torch.int64, device="cuda"), (3, 0), value=0)
    mask[0] = 1
    alignment.set_rows(MIXES[:2])
    expected = alignment.model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(alignment.decoder(max_batch=2, max_length=64).generate(ids, mask, max_new_tokens=NEW), expected)
