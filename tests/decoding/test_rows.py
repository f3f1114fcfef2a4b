"""Rows that join, leave and change: what each decodes is what it would decode alone."""

from __future__ import annotations

import pytest
import torch

import alignvec
from alignvec import AlignvecError, Decoder, Sampling
from tests.models import random_vector, tiny

NEW = 10


@pytest.fixture
def alignment() -> alignvec.Alignment:
    model = tiny()
    return alignvec.attach(model, {"a": random_vector(model, 1, 0.3), "b": random_vector(model, 2, 0.3)})


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(alignment: alignvec.Alignment, ids: list[int], mix: dict[str, float], new: int = NEW) -> list[int]:
    """The greedy answer by the model itself."""
    with alignment.using(mix):
        output = alignment.model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=-1)
    return output[0, len(ids) :].tolist()


def without_cache(alignment: alignvec.Alignment, ids: list[int], mixes: list[dict[str, float]]) -> list[int]:
    """An answer whose every token is chosen under its own mix, its whole past computed under that mix, too."""
    text = list(ids)
    for mix in mixes:
        with alignment.using(mix), torch.no_grad():
            text.append(int(alignment.model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(ids) :]


def with_cache(alignment: alignvec.Alignment, ids: list[int], mixes: list[dict[str, float]]) -> list[int]:
    """The same over keys and values as earlier mixes wrote them."""
    from transformers import DynamicCache

    cache, answer, step = DynamicCache(), [], torch.tensor([ids[:-1]])
    with torch.no_grad():
        with alignment.using(mixes[0]):
            alignment.model(step, past_key_values=cache)
        token = ids[-1]
        for mix in mixes:
            with alignment.using(mix):
                token = int(alignment.model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].argmax())
            answer.append(token)
    return answer


def decoded(decoder: Decoder, rows: list[int]) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {row: [] for row in rows}
    while decoder.going:
        for row, token in decoder.step().items():
            answers[row].append(token)
    return answers


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "own forward"])
def test_rows_join_and_leave_while_others_decode(alignment: alignvec.Alignment, fuse: bool) -> None:
    decoder = alignment.decoder(max_batch=3, max_length=40, fuse=fuse)
    requests = [(prompt(i, 3 + 2 * i), {"a": 1.0 - 0.5 * i, "b": 0.3 * i}) for i in range(6)]
    waiting, running, answers = list(enumerate(requests)), {}, {}
    for step in range(60):
        while waiting and decoder.free and step % 3 == 0:  # arrivals between steps, into any free row
            number, (ids, mix) = waiting.pop(0)
            running[decoder.join(ids, mix, max_new_tokens=NEW)] = number
        if decoder.going:
            decoder.step()
        for row, number in list(running.items()):
            ids = requests[number][0]
            if len(decoder.text(row)) == len(ids) + NEW:
                answers[number] = decoder.text(row)[len(ids) :]
                decoder.leave(row)
                del running[row]
    assert answers == {number: alone(alignment, ids, mix) for number, (ids, mix) in enumerate(requests)}
    assert decoder.free == 3


def test_steps_are_queued_ahead_of_their_tokens(alignment: alignvec.Alignment) -> None:
    decoder = alignment.decoder(max_batch=2, max_length=40)
    ids = prompt(0, 5)
    row = decoder.join(ids, {"a": 1.0}, max_new_tokens=3)
    for _ in range(3):
        decoder.launch()
    with pytest.raises(AlignvecError, match="no row has tokens left"):
        decoder.launch()
    other = decoder.join(ids, {"b": 1.0}, max_new_tokens=3)
    assert [decoder.collect() for _ in range(3)] == [{row: t} for t in alone(alignment, ids, {"a": 1.0}, 3)]
    with pytest.raises(AlignvecError, match="no step was launched"):
        decoder.collect()
    assert decoded(decoder, [other])[other] == alone(alignment, ids, {"b": 1.0}, 3)
    decoder.leave(row)
    with pytest.raises(AlignvecError, match=f"row {row} is free"):
        decoder.leave(row)
    with pytest.raises(AlignvecError, match="is free"):
        decoder.set_row(7, {})


def test_a_step_on_its_way_gives_no_token_to_who_comes_after(alignment: alignvec.Alignment) -> None:
    decoder = alignment.decoder(max_batch=1, max_length=40)
    row = decoder.join(prompt(0, 5), {"a": 1.0})
    decoder.launch()
    decoder.leave(row)
    ids = prompt(1, 4)
    assert decoder.join(ids, {"b": 1.0}, max_new_tokens=NEW) == row
    decoder.launch()
    assert decoder.collect() == {}
    answer = [*decoder.collect().values(), *decoded(decoder, [row])[row]]
    assert answer == alone(alignment, ids, {"b": 1.0})


SCHEDULE = [{"a": 1.0}] * 3 + [{"b": -1.0}] * 2 + [{"a": -0.5, "b": 0.5}] * 5


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["table", "function", "set_row", "set"])
def test_a_mix_changes_at_any_token(alignment: alignvec.Alignment, kind: str, recompute: bool) -> None:
    ids = prompt(3, 7)
    decoder = alignment.decoder(max_batch=2, max_length=40)
    other = decoder.join(prompt(4, 6), {"a": 0.5}, max_new_tokens=NEW)
    if kind in ("table", "function"):
        mix = SCHEDULE[:6] if kind == "table" else lambda token: SCHEDULE[token]  # a table's last mix stays
        row = decoder.join(ids, mix, max_new_tokens=NEW, recompute=recompute)
        answers = decoded(decoder, [row, other])
    else:
        answers = {other: []}
        alignment.set(SCHEDULE[0])
        row = decoder.join(ids, SCHEDULE[0] if kind == "set_row" else None, max_new_tokens=NEW, recompute=recompute)
        answers[row] = []
        for mix in SCHEDULE:
            if kind == "set":
                alignment.set(mix)
            else:
                decoder.set_row(row, mix, recompute=recompute)
            for each, token in decoder.step().items():
                answers[each].append(token)
    expected = (without_cache if recompute else with_cache)(alignment, ids, SCHEDULE)
    assert answers[row] == expected
    assert expected != (with_cache if recompute else without_cache)(alignment, ids, SCHEDULE), "both ways agree"
    assert answers[other] == alone(alignment, prompt(4, 6), {"a": 0.5})


def test_generate_takes_schedules(alignment: alignvec.Alignment) -> None:
    ids = torch.tensor([prompt(3, 7), prompt(5, 7)])
    decoder = alignment.decoder(max_batch=2, max_length=40)
    got = decoder.generate(ids, mixes=[SCHEDULE, {"a": 1.0}], max_new_tokens=NEW, eos_token_id=-1, recompute=True)
    assert got[0, 7:].tolist() == without_cache(alignment, prompt(3, 7), SCHEDULE)
    assert got[1, 7:].tolist() == alone(alignment, prompt(5, 7), {"a": 1.0})


@pytest.mark.parametrize("mix", [[], 3, "a", lambda token: 3, [{"c": 1.0}], lambda token: {"a": float("nan")}])
def test_what_is_no_schedule_is_refused(alignment: alignvec.Alignment, mix: object) -> None:
    decoder = alignment.decoder(max_length=40)
    with pytest.raises(AlignvecError, match=r"no schedule|no mix|no vector named|must be finite"):
        decoder.join(prompt(0, 5), mix)  # type: ignore[arg-type]
    assert decoder.free == 1
    row = decoder.join(prompt(0, 5), {"a": 1.0}, max_new_tokens=NEW)
    with pytest.raises(AlignvecError, match=r"no schedule|no mix|no vector named|must be finite"):
        decoder.set_row(row, mix)  # type: ignore[arg-type]
    assert decoded(decoder, [row])[row] == alone(alignment, prompt(0, 5), {"a": 1.0})


def test_a_blend_adds_up_the_logits_of_its_policies(alignment: alignvec.Alignment) -> None:
    policies = [({"a": 1.0}, 0.7), ({"b": 1.0}, 0.6), ({}, -0.3)]
    prompts = [prompt(6, 5), prompt(7, 5)]
    expected = []
    for ids in prompts:
        text = list(ids)
        for _ in range(NEW):
            total = 0
            for mix, weight in policies:
                with alignment.using(mix), torch.no_grad():
                    total = total + weight * alignment.model(torch.tensor([text])).logits[0, -1]
            text.append(int(total.argmax()))
        expected.append(text)
    decoder = alignment.decoder(max_batch=8, max_length=40)
    got = decoder.generate(torch.tensor(prompts), blend=policies, max_new_tokens=NEW, eos_token_id=-1)
    assert got.tolist() == expected
    assert expected[0][5:] != alone(alignment, prompts[0], {"a": 1.0})
    sampled = decoder.generate(
        torch.tensor(prompts), blend=policies, max_new_tokens=NEW, eos_token_id=-1, sampling=Sampling(temperature=1.0)
    )
    assert sampled.shape == got.shape
    # Rows that a blend has left decode alone again.
    assert decoder.generate(torch.tensor(prompts), mixes=[{"a": 1.0}] * 2, max_new_tokens=NEW, eos_token_id=-1)[
        0, 5:
    ].tolist() == alone(alignment, prompts[0], {"a": 1.0})
    for bad, message in (
        ([], "give 1 to 8"),
        ([{"a": 1.0}], "no policy"),
        ([({"c": 1.0}, 1.0)], "no vector named"),
    ):
        with pytest.raises(AlignvecError, match=message):
            decoder.generate(torch.tensor(prompts), blend=bad)
    with pytest.raises(AlignvecError, match="leave mixes out"):
        decoder.generate(torch.tensor(prompts), blend=policies, mixes=[{}, {}])
    assert decoder.free == 8


def test_an_exception_frees_the_rows(alignment: alignvec.Alignment) -> None:
    decoder = alignment.decoder(max_batch=2, max_length=40)

    def schedule(token: int) -> dict[str, float]:
        if token == 3:
            raise RuntimeError("schedule broke")
        return {"a": 1.0}

    ids = torch.tensor([prompt(0, 5), prompt(1, 5)])
    with pytest.raises(RuntimeError, match="schedule broke"):
        decoder.generate(ids, mixes=[{}, schedule], max_new_tokens=NEW)
    assert decoder.free == 2
    got = decoder.generate(ids, mixes=[{"a": 1.0}, {}], max_new_tokens=NEW, eos_token_id=-1)
    assert got[0, 5:].tolist() == alone(alignment, prompt(0, 5), {"a": 1.0})


def test_the_model_itself_goes_on_as_before(alignment: alignvec.Alignment) -> None:
    ids = torch.tensor([prompt(0, 5)])
    alignment.set(b=0.5)
    before = alignment.model(ids).logits
    decoder = alignment.decoder(max_batch=2, max_length=40)
    row = decoder.join(ids[0], {"a": 1.0}, max_new_tokens=NEW)
    answer = []
    for _ in range(NEW):
        answer += decoder.step().values()
        assert torch.equal(alignment.model(ids).logits, before)
    assert answer == alone(alignment, prompt(0, 5), {"a": 1.0})
    assert decoder.text(row) == [*prompt(0, 5), *answer]
    assert alignment.coefficients == {"a": 0.0, "b": 0.5}
