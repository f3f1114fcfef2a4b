"""A mix is read once: what a prompt or a step is computed under is what its keys and values are known by."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import alignvec
from alignvec import AlignvecError
from tests.decoding.truth import Truth
from tests.models import random_vector, tiny

IDS = list(range(3, 33))
PLUS, MINUS, OTHER = {"a": 1.0}, {"a": -1.0}, {"b": 1.0}


@pytest.fixture
def made() -> tuple[alignvec.Alignment, Truth]:
    model = tiny(num_hidden_layers=1)
    vectors = {"a": random_vector(model, 1, 0.3), "b": random_vector(model, 2, 0.3)}
    truth = Truth(model, vectors)
    return alignvec.attach(model, vectors), truth


def require_true(decoder: alignvec.Decoder, truth: Truth) -> None:
    """Every prefix that is kept is what its name says, whether the weights or a row of the table held the mix."""
    assert decoder.prefixes._kept
    for ((weights, mix), _), kept in decoder.prefixes._kept.items():
        named = dict(zip("ab", weights or mix, strict=True))
        assert truth.error(named, kept.tokens.tolist(), kept.states) < 1e-4, named


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("what", ["set", "set_rows", "materialise", "restore", "materialise another"])
def test_a_write_while_a_prompt_is_read(made: tuple[alignvec.Alignment, Truth], what: str, thread: bool) -> None:
    alignment, truth = made
    decoder = alignment.decoder(max_length=64, prefix_bytes=1 << 20)
    if what in ("restore", "materialise another"):
        alignment.materialise(PLUS)
    else:
        alignment.set(PLUS)
    write: Any = {
        "set": lambda: alignment.set(MINUS),
        "set_rows": lambda: alignment.set_rows([MINUS]),
        "restore": lambda: (alignment.restore(), alignment.set(MINUS)),
    }.get(what, lambda: alignment.materialise(MINUS))
    moves = what not in ("set", "set_rows")
    find, threads = decoder.prefixes.find, []

    def during(*args: Any) -> Any:
        if thread:
            threads.append(threading.Thread(target=write))
            threads[0].start()
            threads[0].join(0.3)
            assert threads[0].is_alive() == moves, "what moves the weights waits for the step, and nothing else does"
        elif moves:
            with pytest.raises(AlignvecError, match=r"(materialise|restore)\(\) changes the model's weights.*after it"):
                write()
        else:
            write()
        return find(*args)

    decoder.prefixes.find = during  # type: ignore[method-assign]
    row = decoder.join(IDS, max_new_tokens=2)
    decoder.prefixes.find = find  # type: ignore[method-assign]
    for each in threads:
        each.join()
    require_true(decoder, truth)
    after = MINUS if thread or not moves else PLUS
    assert [decoder.step()[row], decoder.step()[row]] == truth.answer(IDS, [after] * 2, read=PLUS)
    decoder.leave(row)
    require_true(decoder, truth)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_function_is_asked_once_a_step(made: tuple[alignvec.Alignment, Truth], recompute: bool) -> None:
    """One whose answers change from call to call: what it says at a step is what the step uses."""
    alignment, truth = made
    asked: list[dict[str, float]] = []

    def mix(token: int) -> dict[str, float]:
        asked.append((PLUS, MINUS, OTHER)[len(asked) % 3])
        return asked[-1]

    decoder = alignment.decoder(max_length=64, prefix_bytes=1 << 20)
    row = decoder.join(IDS, mix, max_new_tokens=4, recompute=recompute)
    assert len(asked) == 1
    require_true(decoder, truth)
    tokens = [decoder.step()[row] for _ in range(4)]
    assert len(asked) == 5
    if not recompute:
        assert tokens == truth.answer(IDS, asked[1:], read=asked[0])
    else:
        for number, token in enumerate(tokens):
            assert truth.likely(asked[number + 1], [*IDS, *tokens[:number]], token)
    decoder.leave(row)
    require_true(decoder, truth)


def test_all_rows_that_follow_are_of_one_write(made: tuple[alignvec.Alignment, Truth]) -> None:
    """A function of the row between two that follow writes both, in the middle of what was read row by row."""
    alignment, truth = made
    decoder = alignment.decoder(max_batch=3, max_length=64)
    writes = [[PLUS, OTHER, MINUS], [MINUS, PLUS, OTHER]]

    def mix(token: int) -> dict[str, float]:
        alignment.set_rows(writes[token % 2])
        return PLUS

    alignment.set_rows(writes[1])
    prompts = [[*IDS, 40 + row] for row in range(3)]
    rows = decoder.admit(prompts, [None, mix, None], [alignvec.Sampling()] * 3, 6)
    answers: dict[int, list[int]] = {row: [] for row in rows}
    while decoder.going:
        for row, token in decoder.step().items():
            answers[row].append(token)
    for row in (0, 2):
        mixes = [writes[token % 2][row] for token in range(6)]
        assert answers[rows[row]] == truth.answer(prompts[row], mixes)
    assert answers[rows[1]] == truth.answer(prompts[1], [PLUS] * 6)


def test_a_text_that_was_not_read_to_the_end_is_read_again(made: tuple[alignvec.Alignment, Truth]) -> None:
    alignment, truth = made
    decoder = alignment.decoder(max_length=64, prefix_bytes=1 << 20)
    alignment.set(PLUS)
    row = decoder.join(IDS, max_new_tokens=3, recompute=True)
    first = decoder.step()[row]
    alignment.set(MINUS)

    def fail(*_: Any) -> None:
        raise MemoryError("none left")

    handle = alignment.model.base_model.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        decoder.step()
    handle.remove()
    second = decoder.step()[row]
    assert truth.likely(MINUS, [*IDS, first], second)
    decoder.leave(row)
    require_true(decoder, truth)
    known = decoder.prefixes.hits
    decoder.join([*IDS, first, 5], MINUS)
    assert decoder.prefixes.hits > known, "what was read again is kept"


def test_a_mix_that_comes_back_while_another_is_materialised(made: tuple[alignvec.Alignment, Truth]) -> None:
    """`using` writes back what was set before, which is not what the weights hold."""
    alignment, truth = made
    decoder = alignment.decoder(max_length=64, prefix_bytes=1 << 20)
    alignment.set(MINUS)
    with alignment.using(PLUS):
        alignment.materialise()
    assert alignment.weights == (1.0, 0.0)
    assert alignment.coefficients == {"a": 1.0, "b": 0.0}
    decoder.leave(decoder.join(IDS))
    require_true(decoder, truth)
    alignment.restore()
    assert alignment.coefficients == {"a": -1.0, "b": 0.0}
    assert torch.isfinite(alignment.model(torch.tensor([IDS])).logits).all()
