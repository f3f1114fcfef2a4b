"""Keys and values that outlive a row: found by tokens and mix, never by tokens alone."""

from __future__ import annotations

import pytest
import torch

import alignvec
from alignvec.decoding.prefixes import Prefixes
from tests.models import random_vector, tiny

NEW = 8


@pytest.fixture
def alignment() -> alignvec.Alignment:
    model = tiny()
    return alignvec.attach(model, {"a": random_vector(model, 1, 0.3), "b": random_vector(model, 2, 0.3)})


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answer(decoder: alignvec.Decoder, ids: list[int], mix: dict[str, float] | None) -> list[int]:
    mixes = None if mix is None else [mix]
    output = decoder.generate(torch.tensor([ids]), mixes=mixes, max_new_tokens=NEW, eos_token_id=-1)
    return output[0, len(ids) :].tolist()


def test_a_prompt_goes_on_from_what_was_read_before(alignment: alignvec.Alignment) -> None:
    system = prompt(0, 30)
    without = alignment.decoder(max_length=80)
    decoder = alignment.decoder(max_length=80, prefix_bytes=1 << 20)
    turns = list(system)
    for turn in range(3):  # a conversation: every turn begins with all that was said
        turns += prompt(1 + turn, 5)
        known = decoder.prefixes.hits
        got = answer(decoder, turns, {"a": 1.0})
        assert got == answer(without, turns, {"a": 1.0})
        if turn:  # all but the last token of the answer, whose keys and values were never written
            assert decoder.prefixes.hits - known == len(turns) - 5 - 1
        turns += got
    known = decoder.prefixes.hits
    other = [*system, *prompt(9, 7)]  # another conversation under the same instruction
    assert answer(decoder, other, {"a": 1.0}) == answer(without, other, {"a": 1.0})
    assert decoder.prefixes.hits - known == len(system)


def test_another_mix_finds_nothing(alignment: alignvec.Alignment) -> None:
    ids = prompt(0, 30)
    without = alignment.decoder(max_length=80)
    decoder = alignment.decoder(max_length=80, prefix_bytes=1 << 20)
    for mix in ({"a": 1.0}, {"a": 0.5}, {"b": 1.0}, {}, None):
        alignment.set(b=-1.0)
        known = decoder.prefixes.hits
        assert answer(decoder, ids, mix) == answer(without, ids, mix)
        assert decoder.prefixes.hits == known, mix
    alignment.set(b=1.0)  # the same mix, by whichever way it was asked for
    assert answer(decoder, ids, None) == answer(without, ids, None)
    assert decoder.prefixes.hits > known


def test_a_materialised_mix_is_another_one(alignment: alignvec.Alignment) -> None:
    ids = prompt(0, 30)
    decoder = alignment.decoder(max_length=80, prefix_bytes=1 << 20)
    answer(decoder, ids, {"a": 1.0})
    for mix in ({"a": 1.0}, {"a": -1.0}, {"b": 1.0}):
        alignment.materialise(mix)
        assert answer(decoder, ids, None) == answer(alignment.decoder(max_length=80), ids, None)
        assert decoder.prefixes.hits == 0
    answer(decoder, ids, None)
    assert decoder.prefixes.hits == len(ids) - 1


@pytest.mark.parametrize("kind", ["schedule", "set_row", "set"])
def test_a_past_of_several_mixes_is_not_kept(alignment: alignvec.Alignment, kind: str) -> None:
    """What was read under one mix is; what was decoded on under another is under neither's name."""
    ids = prompt(0, 30)
    decoder = alignment.decoder(max_length=80, prefix_bytes=1 << 20)
    alignment.set(a=1.0)
    mixes = [{"a": 1.0}] * 2 + [{"b": 1.0}]
    row = decoder.join(ids, {"schedule": mixes, "set_row": {"a": 1.0}, "set": None}[kind], max_new_tokens=NEW)
    for step in range(NEW):
        if step == 2 and kind == "set_row":
            decoder.set_row(row, {"b": 1.0})
        if step == 2 and kind == "set":
            alignment.set(b=1.0)
        decoder.step()
    text = decoder.text(row)
    decoder.leave(row)
    for mix, known in (({"a": 1.0}, len(ids) - 1), ({"b": 1.0}, 0)):
        before = decoder.prefixes.hits
        assert answer(decoder, text, mix) == answer(alignment.decoder(max_length=80), text, mix)
        assert decoder.prefixes.hits - before == known, mix
        decoder.forget() if mix == {"a": 1.0} else None


def test_room_is_limited_and_the_least_recently_used_goes() -> None:
    def states(tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.zeros(1, tokens, 8), torch.zeros(1, tokens, 8))]  # 64 bytes a token

    prefixes = Prefixes(64 * 100)
    first, second, third = list(range(40)), list(range(100, 140)), list(range(200, 240))
    prefixes.keep(first, "m", states(40))
    prefixes.keep(second, "m", states(40))
    assert prefixes.find([*first, 1], "m")[0] == 40
    prefixes.keep(third, "m", states(40))
    assert prefixes.nbytes <= prefixes.capacity
    assert [prefixes.find(ids, "m")[0] for ids in (first, second, third)] == [40, 0, 40]
    assert prefixes.find(first, "n") == (0, [])
    assert prefixes.find(first[:10], "m") == (0, []), "too short to be worth a copy"
    prefixes.keep(list(range(200)), "m", states(200))
    assert prefixes.find(first, "m")[0] == 40, "what is too large drives nothing out"
    prefixes.keep([*first, *range(500, 520)], "m", states(60))
    assert prefixes.nbytes == 64 * 100, "a continuation takes the place of what it continues"
    prefixes.clear()
    assert prefixes.nbytes == 0
