"""Rows of a decoder whose model has a mix materialised, and restored, while they live."""

from __future__ import annotations

from typing import Any

import pytest

import alignvec
from alignvec import AlignvecError
from tests.decoding.truth import Truth
from tests.models import random_vector, tiny

IDS, BESIDE = list(range(3, 23)), list(range(40, 55))
ZERO, PLUS, MINUS, OTHER = {}, {"a": 1.0}, {"a": -1.0}, {"b": 1.0}
REFUSED = r"row 0 has a mix of its own.*restore\(\) first"


@pytest.fixture(params=[None, False], ids=["fused", "own forward"])
def fuse(request: pytest.FixtureRequest) -> bool | None:
    return request.param


def build(max_rows: int = 64) -> tuple[alignvec.Alignment, Truth]:
    model = tiny(num_hidden_layers=1)
    vectors = {"a": random_vector(model, 1, 0.3), "b": random_vector(model, 2, 0.3)}
    truth = Truth(model, vectors)
    return alignvec.attach(model, vectors, max_rows=max_rows), truth


@pytest.mark.parametrize("made_before", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_row_that_joined_then_follows(fuse: bool | None, made_before: bool, recompute: bool) -> None:
    alignment, truth = build()
    options: dict[str, Any] = {"max_batch": 2, "max_length": 64, "fuse": fuse}
    decoder = alignment.decoder(**options) if made_before else None
    alignment.materialise(PLUS)
    decoder = decoder or alignment.decoder(**options)
    row = decoder.join(IDS, recompute=recompute)
    mixes, tokens = [PLUS, MINUS, OTHER, MINUS, ZERO, PLUS], [decoder.step()[row]]
    alignment.restore()
    alignment.set(MINUS)
    tokens.append(decoder.step()[row])
    alignment.materialise(OTHER)
    tokens.append(decoder.step()[row])
    alignment.materialise(MINUS)  # in the same buffers
    tokens.append(decoder.step()[row])
    alignment.restore()
    alignment.set(ZERO)
    tokens.append(decoder.step()[row])
    alignment.set(PLUS)
    tokens.append(decoder.step()[row])
    if recompute:
        for number, (mix, token) in enumerate(zip(mixes, tokens, strict=True)):
            assert truth.likely(mix, [*IDS, *tokens[:number]], token)
    else:
        assert tokens == truth.answer(IDS, mixes)


@pytest.mark.parametrize("made_before", [True, False])
def test_a_mix_given_to_a_later_row_is_applied(fuse: bool | None, made_before: bool) -> None:
    alignment, truth = build()
    options: dict[str, Any] = {"max_batch": 2, "max_length": 64, "fuse": fuse}
    decoder = alignment.decoder(**options) if made_before else None
    alignment.materialise(ZERO)
    decoder = decoder or alignment.decoder(**options)
    follower = decoder.join(IDS)
    alignment.restore()
    later = decoder.join(BESIDE, PLUS)
    answers: dict[int, list[int]] = {follower: [], later: []}
    for _ in range(6):
        for row, token in decoder.step().items():
            answers[row].append(token)
    assert answers == {follower: truth.answer(IDS, [ZERO] * 6), later: truth.answer(BESIDE, [PLUS] * 6)}
    decoder.set_row(follower, OTHER)
    assert decoder.step()[follower] == truth.answer(IDS, [*[ZERO] * 6, OTHER])[-1]


@pytest.mark.parametrize("kind", ["mix", "table", "function", "set_row"])
@pytest.mark.parametrize("other", [ZERO, PLUS])
def test_a_row_of_its_own_waits_for_restore(fuse: bool | None, kind: str, other: dict[str, float]) -> None:
    alignment, truth = build()
    decoder = alignment.decoder(max_batch=2, max_length=64, fuse=fuse, prefix_bytes=1 << 20)
    mix: Any = {"mix": PLUS, "table": [PLUS, PLUS, OTHER], "function": lambda n: OTHER if n > 1 else PLUS}.get(kind)
    row = decoder.join(IDS, PLUS if kind == "set_row" else mix)
    beside = decoder.join(BESIDE)
    tokens, next_to = [decoder.step()], []
    if kind == "set_row":
        decoder.set_row(row, PLUS)
    alignment.materialise(other)
    for _ in range(2):
        with pytest.raises(AlignvecError, match=REFUSED):
            decoder.step()
    with pytest.raises(AlignvecError, match="materialised"):
        decoder.set_row(row, PLUS)
    with pytest.raises(AlignvecError, match="materialised"):
        decoder.set_row(beside, MINUS)
    alignment.restore()
    alignment.set(MINUS)
    tokens += [decoder.step() for _ in range(3)]
    later = OTHER if kind in ("table", "function") else PLUS
    assert [each[row] for each in tokens] == truth.answer(IDS, [PLUS, PLUS, later, later])
    next_to = [each[beside] for each in tokens]
    assert next_to == truth.answer(BESIDE, [ZERO, *[MINUS] * 3])
    decoder.leave(row)
    decoder.join([*IDS, tokens[0][row]], PLUS)
    assert (decoder.prefixes.hits > 0) or kind in ("table", "function")


def test_a_row_of_its_own_may_follow_instead(fuse: bool | None) -> None:
    alignment, truth = build()
    decoder = alignment.decoder(max_length=64, fuse=fuse)
    row = decoder.join(IDS, PLUS)
    alignment.materialise(MINUS)
    with pytest.raises(AlignvecError, match=REFUSED):
        decoder.step()
    decoder.set_row(row, None)
    assert [decoder.step()[row], decoder.step()[row]] == truth.answer(IDS, [MINUS, MINUS], read=PLUS)
    decoder.leave(row)
    for mix in (PLUS, [PLUS], lambda token: PLUS):
        with pytest.raises(AlignvecError, match=REFUSED):
            decoder.join(IDS, mix)
    assert decoder.free == 1


def test_a_decoder_made_while_a_mix_is_materialised_needs_rows_of_coefficients() -> None:
    alignment, _ = build(max_rows=2)
    alignment.materialise(PLUS)
    with pytest.raises(AlignvecError, match="max_batch=3 does not fit the 2 rows of coefficients"):
        alignment.decoder(max_batch=3)


def test_what_cannot_have_rows_is_found_when_mixes_apply() -> None:
    """A decoder that was made while a mix was materialised could not find it out then."""
    alignment, truth = build()
    edit = next(iter(alignment._swaps)).aligned.edit
    alignment._unplaced = [edit]  # as if the trial of the model had said so
    alignment.materialise(PLUS)
    decoder = alignment.decoder(max_batch=2, max_length=64)
    row = decoder.join(IDS)
    alignment.restore()
    with pytest.raises(AlignvecError, match=r"different mixes, and MistralForCausalLM cannot be decoded so"):
        decoder.join(BESIDE, OTHER)
    assert decoder.free == 1
    assert decoder.step()[row] == truth.answer(IDS, [PLUS])[0]


def test_vectors_of_a_living_decoder_that_leave(fuse: bool | None) -> None:
    alignment, _ = build()
    model = alignment.model
    decoder = alignment.decoder(max_length=64, fuse=fuse)
    row = decoder.join(IDS, PLUS)
    vector = random_vector(model, 3)
    alignment.detach()
    for _ in range(2):
        for call in (decoder.step, lambda: decoder.set_row(row, None), lambda: decoder.set_row(row, PLUS)):
            with pytest.raises(AlignvecError, match="attached or detached since this decoder was made"):
                call()
        alignvec.attach(model, {"a": vector}) if not hasattr(model, "alignment") else None
    decoder.leave(row)
    with pytest.raises(AlignvecError, match="attached or detached since this decoder was made"):
        decoder.join(IDS)
