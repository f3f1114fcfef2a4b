"""What a decoder is given: token ids of its model, whole numbers, and weights that are finite in float32."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy
import pytest
import torch

import alignvec
from alignvec import AlignvecError, Sampling
from tests.models import random_vector, tiny

GOOD = [3, 4, 5]
HUGE = 10**400
WRONG_IDS: list[Any] = [
    [3, 101, 5],
    [3, -1, 5],
    [3, 2.5, 5],
    [3.0, 4.0],
    [3, float("nan"), 5],
    [True, False],
    [3, True],
    [3, HUGE],
    [3, 10**5000],
    [3, None],
    "abc",
    {"input_ids": GOOD},
    [torch.tensor(True), 4],
    [torch.tensor([3, 4]), 4],
    torch.tensor([3.0, 4.0]),
    torch.tensor([True, False]),
    torch.tensor([3, 101]),
    torch.tensor([3 + 1j]),
    numpy.array([3, 101]),
    numpy.array([3.0]),
    numpy.array([True]),
]


def _kind(value: Any) -> str:
    return type(value).__name__


@pytest.fixture(scope="module")
def alignment() -> alignvec.Alignment:
    model = tiny(num_hidden_layers=1)
    return alignvec.attach(model, {"a": random_vector(model, 1, 0.3)})


@pytest.mark.parametrize("ids", WRONG_IDS, ids=_kind)
def test_what_is_no_token_id_is_refused(alignment: alignvec.Alignment, ids: Any) -> None:
    decoder = alignment.decoder(max_batch=2, max_length=24)
    row = decoder.join(GOOD, {"a": 1.0})
    with pytest.raises(AlignvecError, match="is no token id of this model, whose vocabulary has 101"):
        decoder.join(ids)
    assert decoder.free == 1
    assert decoder.step().keys() == {row}, "the rows beside it go on"


@pytest.mark.parametrize("ids", [torch.tensor([[3, 4], [3, 101]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[True]])])
@pytest.mark.parametrize("way", ["generate", "blend", "custom_generate"])
def test_by_every_way_in(alignment: alignvec.Alignment, ids: torch.Tensor, way: str) -> None:
    decoder = alignment.decoder(max_batch=4, max_length=24)
    row = decoder.join(GOOD)
    if way == "custom_generate" and ids.dtype != torch.int64:
        pytest.skip("transformers prepares these itself")
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: decoder.generate(ids, max_new_tokens=2),
        "blend": lambda: decoder.generate(ids, blend=[({"a": 1.0}, 1.0)], max_new_tokens=2),
        "custom_generate": lambda: alignment.model.generate(
            ids, custom_generate=decoder, max_new_tokens=2, do_sample=False
        ),
    }
    with pytest.raises(AlignvecError, match="is no token id"):
        calls[way]()
    assert decoder.free == 3
    assert decoder.step().keys() == {row}


def test_good_ones_of_every_kind(alignment: alignvec.Alignment) -> None:
    decoder = alignment.decoder(max_length=24)
    answers = set()
    for ids in (
        GOOD,
        tuple(GOOD),
        range(3, 6),
        torch.tensor(GOOD),
        torch.tensor([GOOD], dtype=torch.int32),
        [GOOD],
        numpy.array(GOOD, dtype=numpy.uint8),
        [numpy.int64(3), torch.tensor(4), 5],
    ):
        row = decoder.join(ids)
        answers.add(decoder.step()[row])
        assert decoder.text(row)[:3] == GOOD
        decoder.leave(row)
    assert len(answers) == 1


def test_several_prompts_are_no_row(alignment: alignvec.Alignment) -> None:
    decoder = alignment.decoder(max_batch=2, max_length=24)
    for ids in (torch.tensor([GOOD, GOOD]), [GOOD, GOOD], numpy.array([GOOD, GOOD])):
        with pytest.raises(AlignvecError, match="input_ids holds 2 prompts"):
            decoder.join(ids)
    for ids in (GOOD, [GOOD]):
        with pytest.raises(AlignvecError, match=r"input_ids must be a tensor \[batch, tokens\], not a list"):
            decoder.generate(ids)  # type: ignore[arg-type]
    with pytest.raises(AlignvecError, match="attention_mask must be a tensor"):
        decoder.generate(torch.tensor([GOOD]), [[1, 1, 1]])  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [2.5, "3", float("nan"), torch.tensor(1.5)])
def test_new_tokens_are_a_whole_number(alignment: alignvec.Alignment, limit: Any) -> None:
    decoder = alignment.decoder(max_length=24)
    with pytest.raises(AlignvecError, match=r"max_new_tokens=.* must be an integer of at least 1"):
        decoder.join(GOOD, max_new_tokens=limit)
    with pytest.raises(AlignvecError, match=r"max_new_tokens=.* must be an integer of at least 1"):
        decoder.generate(torch.tensor([GOOD]), max_new_tokens=limit)


@pytest.mark.parametrize(
    "weight", [1e39, -3.5e38, HUGE, 10**5000, float("nan"), float("inf"), Decimal("1e39"), "x", None], ids=_kind
)
def test_weights_of_blends_are_finite(alignment: alignvec.Alignment, weight: Any) -> None:
    decoder = alignment.decoder(max_batch=5, max_length=24)
    row = decoder.join(GOOD)
    for ids in (torch.tensor([GOOD]), torch.tensor([GOOD, GOOD])):
        with pytest.raises(
            AlignvecError, match=r"the weight of policy 1 (is .* must be finite|must be a number)"
        ) as refusal:
            decoder.generate(ids, blend=[({"a": 1.0}, 0.5), ({}, weight)], max_new_tokens=2)
        assert len(str(refusal.value)) < 200
        assert decoder.free == 4
    assert decoder.step().keys() == {row}


def test_a_blend_is_of_one_prompt(alignment: alignvec.Alignment) -> None:
    decoder = alignment.decoder(max_batch=3, max_length=24)
    for prompts, weights in (([GOOD, [3, 4]], [1.0, 1.0]), ([GOOD, GOOD], [1.0]), ([GOOD], [])):
        with pytest.raises(AlignvecError, match="a blend has 1 to 8 rows of one prompt"):
            decoder.admit(prompts, [None] * len(prompts), [Sampling()] * len(prompts), 2, weights=weights)
    assert decoder.free == 3


@pytest.mark.parametrize("option", ["temperature", "repetition_penalty"])
@pytest.mark.parametrize("value", [1e39, HUGE, 10**5000, float("nan")], ids=_kind)
def test_settings_of_sampling_are_finite(option: str, value: Any) -> None:
    with pytest.raises(AlignvecError, match=f"{option} is .*; it must be a finite"):
        Sampling(**{option: value})
